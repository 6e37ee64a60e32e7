"""Cutting whole tensors into this rank's part and putting the parts together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lasp.kernels.arguments import check_integer, check_tensors, told
from lasp.kernels.documents import document_bounds
from lasp.kernels.once import once_differentiable
from lasp.kernels.values import may_look_at
from lasp.parallel import collectives
from lasp.parallel.batch import CUT, complete, fingerprint, id_range, read_agreement, token_dim
from lasp.parallel.call import Arguments, Turn, begin_call, modes
from lasp.parallel.cut import Cut, check_group
from lasp.parallel.group import SequenceGroup
from lasp.parallel.layout import Piece
from lasp.parallel.untraced import untraced


class Slices(Protocol):
    """Who knows which tokens of a sequence are this rank's: a SequenceGroup, or what a worker process has of one."""

    def slices(self, length: int) -> list[slice]: ...


@untraced
def shard(x: Tensor, group: SequenceGroup | None = None, dim: int = 1, *, cut: Cut | None = None) -> Tensor:
    """This rank's part of a whole tensor along `dim`, of any length of at least one token per rank; of a cut's whole
    sequence, where one is given in the place of a group.

    Sends nothing. Backward: the gradient is zero outside this rank's part; the parts sum to the whole over the ranks.
    """
    _check_dim(x, dim)
    if cut is None:
        check_group(group)
        return _own_tokens(x, group, dim)
    if not isinstance(cut, Cut) or group is not None or x.shape[dim] != cut.total:
        wanted = f"the {cut.total} tokens of its cut" if isinstance(cut, Cut) else "a lasp.Cut"
        raise ValueError(f"shard takes {wanted} and no group, got {x.shape[dim]} tokens, {told(cut)}, {told(group)}")
    return torch.cat([x.narrow(dim, start, stop - start) for start, stop in cut.parts], dim)


def _own_tokens(x: Tensor, group: Slices | None, dim: int) -> Tensor:
    if group is None:
        return x
    return torch.cat([x[(slice(None),) * (dim % x.dim()) + (part,)] for part in group.slices(x.shape[dim])], dim)


@untraced
def unshard(x: Tensor, group: SequenceGroup | None = None, dim: int = 1, *, cut: Cut | None = None) -> Tensor:
    """The whole tensor along `dim` from every rank's part, on every rank: one all-gather.

    Backward is a reduce-scatter: a part receives the sum over the ranks of the gradients of its tokens. The parts may
    have any lengths in the contiguous layout. cut: of the batch, in the place of group. Raises ValueError on every rank
    where shapes or dtypes differ.
    """

    def check() -> Arguments:
        _check_dim(x, dim)
        fields = {
            "dim": dim % x.dim(),
            "shape": [size for i, size in enumerate(x.shape) if i != dim % x.dim()],
            "dtype": str(x.dtype),
            "device": x.device.type,
            "backward": x.requires_grad and torch.is_grad_enabled(),
        }
        return Arguments(fields, x.shape[dim])

    turn = begin_call(group, "unshard", check, cut)
    lies = turn()
    if turn.group is None:
        return x
    whole: Tensor = _Unshard.apply(x.movedim(dim, 0), turn, lies.pieces, lies.lengths)
    return whole.movedim(0, dim)


def _check_dim(x: Tensor, dim: int) -> None:
    check_tensors(x=x)
    check_integer("dim", dim)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be one of x's, whose shape is {list(x.shape)}, got {dim}")


class _Unshard(torch.autograd.Function):
    """
    input      local part [T_rank, ...]
    output     whole [N, ...]
    forward    one all-gather of parts padded to the longest
    backward   one reduce-scatter of the same
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Turn, pieces: tuple[Piece, ...], lengths: tuple[int, ...]) -> Tensor:
        ctx.turn, ctx.group, ctx.pieces, ctx.lengths = turn, turn.group, pieces, lengths
        padded = x.new_zeros(max(lengths), *x.shape[1:])
        padded[: x.shape[0]] = x
        with turn.forward():
            parts = collectives.all_gather(padded, ctx.group.process_group, "forward").wait()
        return torch.cat([parts[p.rank, p.offset : p.offset + p.stop - p.start] for p in pieces])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        parts = grad.new_zeros(ctx.group.size, max(ctx.lengths), *grad.shape[1:])
        for p in ctx.pieces:
            parts[p.rank, p.offset : p.offset + p.stop - p.start] = grad[p.start : p.stop]
        with ctx.turn.backward():
            own = collectives.reduce_scatter(parts, ctx.group.process_group, "backward").wait()
        return own[: ctx.lengths[ctx.group.rank]], None, None, None


@untraced
def shard_batch(batch: Mapping[str, Any], group: SequenceGroup | None, shift: bool = True) -> dict[str, Any]:
    """This rank's part of a whole batch, which is the same on all ranks of the group: one header exchange says so.

    batch: "input_ids" [B, N] or "inputs_embeds" [B, N, D], and any of "labels" [B, N], "position_ids" [.., B, N],
    "attention_mask" [B, N], "cu_seqlens" [documents + 1] (B = 1); tensors, arrays or lists.

    Labels are shifted before they are cut, so that no target is lost at a border, and come back as both "labels" and
    "shift_labels"; with `shift=False` (masked-token losses) they are cut as they are. The target of a document's last
    token is -100. position_ids are made where absent: global, and per document with cu_seqlens. cu_seqlens stay whole.
    How the batch lies on the ranks is returned as "cut" (`lasp.Cut`): a model or an operation that is given it sends no
    more headers.

    Documents that collators of transformers pack are taken too: "cu_seq_lens_q" and "cu_seq_lens_k", "seq_idx",
    position_ids that go back to 0. What of these is there must agree; "max_length_q" and "max_length_k" are dropped.

    Raises ValueError on every rank for an unknown key, lengths that differ, ids or labels that are no integers, and
    batches that are not the same on all ranks; a group without checks sends nothing, and compares nothing.
    """
    return agree_and_cut(lambda: batch, group, shift)


def agree_and_cut(make: Callable[[], Mapping[str, Any]], group: SequenceGroup | None, shift: bool) -> dict[str, Any]:
    """`shard_batch` of the batch that `make` returns; an error of `make` on one rank is one on every rank."""
    local: dict[str, Any] = {}
    ids: tuple[int, int] | None = None

    def check() -> Arguments:
        nonlocal ids
        whole = complete(make(), shift)
        local.update(cut_batch(whole, group))
        positions, documents = whole["position_ids"], whole.get("cu_seqlens")
        compared = group is not None and group.size > 1 and group.checks
        fields = fingerprint(whole) | modes() if compared else {}
        if compared or may_look_at(positions):
            ids = id_range(whole)
        bounds = None if documents is None else document_bounds(documents)
        return Arguments(fields, local["position_ids"].shape[-1], bounds, positions.shape[-1])

    lies = begin_call(group, "shard_batch", check)()
    return local | {CUT: lies.of_batch(frozenset(local), ids)}


def cut_batch(whole: Mapping[str, Tensor], group: Slices | None) -> dict[str, Tensor]:
    """This rank's part of a completed batch."""
    dims = {key: token_dim(key) for key in whole}
    own = {
        key: x if (dim := dims[key]) is None else _own_tokens(x, group, dim).contiguous() for key, x in whole.items()
    }
    if "labels" in own:
        own["shift_labels"] = own["labels"]
    return own


def settle(agreement: Tensor | None, group: SequenceGroup | None) -> None:
    """Compare what a batch from a worker process carries: one header exchange. Raises ValueError on every rank where
    batches differ, or one could not be made."""
    if agreement is not None:
        begin_call(group, "batch of a worker", lambda: Arguments(read_agreement(agreement), 1))()
