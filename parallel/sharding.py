"""Cutting whole tensors into this rank's part and putting the parts together again."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp.kernels.documents import document_bounds
from lasp.parallel import collectives
from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.group import SequenceGroup
from lasp.parallel.layout import Piece, pieces_of

IGNORE_INDEX = -100
_BATCH_KEYS = ("input_ids", "inputs_embeds", "labels", "position_ids", "attention_mask", "cu_seqlens")


def shard(x: Tensor, group: SequenceGroup | None, dim: int = 1) -> Tensor:
    """This rank's part of a whole tensor along `dim`, of any length of at least one token per rank.

    Sends nothing. Backward: the gradient is zero outside this rank's part; the parts sum to the whole over the ranks.
    """
    if group is None:
        return x
    return torch.cat([x[(slice(None),) * (dim % x.dim()) + (part,)] for part in group.slices(x.shape[dim])], dim)


def unshard(x: Tensor, group: SequenceGroup | None, dim: int = 1) -> Tensor:
    """The whole tensor along `dim` from every rank's part, on every rank: one all-gather.

    Backward is a reduce-scatter: a part receives the sum over the ranks of the gradients of its tokens. The parts may
    have any lengths in the contiguous layout. Raises ValueError on every rank where shapes or dtypes differ.
    """

    def check() -> Arguments:
        rest = [size for i, size in enumerate(x.shape) if i != dim % x.dim()]
        backward = x.requires_grad and torch.is_grad_enabled()
        return Arguments({"dim": dim, "shape": rest, "dtype": str(x.dtype), "backward": backward}, x.shape[dim])

    lengths = begin_call(group, check)()
    if group is None or group.size == 1:
        return x
    whole: Tensor = _Unshard.apply(x.movedim(dim, 0), group, pieces_of(lengths, group.layout), lengths)
    return whole.movedim(0, dim)


class _Unshard(torch.autograd.Function):
    """
    input      local part [T_rank, ...]
    output     whole [N, ...]
    forward    one all-gather of parts padded to the longest
    backward   one reduce-scatter of the same
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: SequenceGroup, pieces: tuple[Piece, ...], lengths: tuple[int, ...]
    ) -> Tensor:
        ctx.group, ctx.pieces, ctx.lengths = group, pieces, lengths
        padded = x.new_zeros(max(lengths), *x.shape[1:])
        padded[: x.shape[0]] = x
        parts = collectives.all_gather(padded, group.process_group, "forward").wait()
        return torch.cat([parts[p.rank, p.offset : p.offset + p.stop - p.start] for p in pieces])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        parts = grad.new_zeros(ctx.group.size, max(ctx.lengths), *grad.shape[1:])
        for p in ctx.pieces:
            parts[p.rank, p.offset : p.offset + p.stop - p.start] = grad[p.start : p.stop]
        own = collectives.reduce_scatter(parts, ctx.group.process_group, "backward").wait()
        return own[: ctx.lengths[ctx.group.rank]], None, None, None


def shard_batch(batch: Mapping[str, Any], group: SequenceGroup | None, shift: bool = True) -> dict[str, Any]:
    """This rank's part of a whole batch.

    batch: "input_ids" [B, N] or "inputs_embeds" [B, N, D], and any of "labels" [B, N], "position_ids" [.., B, N],
    "attention_mask" [B, N], "cu_seqlens" [documents + 1].

    Labels are shifted before they are cut, so that no target is lost at a border, and come back as both "labels" and
    "shift_labels"; with `shift=False` (masked-token losses) they are cut as they are. The target of a document's last
    token is -100. position_ids are made where absent: global, and per document with cu_seqlens. cu_seqlens stay whole.
    Raises ValueError for an unknown key, or lengths that differ.
    """
    unknown = sorted(set(batch) - set(_BATCH_KEYS))
    if unknown:
        raise ValueError(f"shard_batch knows {', '.join(_BATCH_KEYS)}; got {', '.join(unknown)}")
    given = {key: value for key, value in batch.items() if value is not None}
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    if tokens is None:
        raise ValueError(f"a batch needs input_ids or inputs_embeds, got {', '.join(given) or 'nothing'}")
    length = tokens.shape[1]
    dims = {"inputs_embeds": 1, "position_ids": -1}
    for key, value in given.items():
        if key != "cu_seqlens" and value.shape[dims.get(key, 1)] != length:
            raise ValueError(f"{key} has shape {list(value.shape)}, but the batch has {length} tokens per sequence")
    bounds = document_bounds(given["cu_seqlens"], length) if "cu_seqlens" in given else (0, length)
    if "position_ids" not in given:
        given["position_ids"] = _positions(bounds, tokens)
    if "labels" in given and shift:
        given["labels"] = _shifted(given["labels"], bounds)
    cut = {
        key: value if key == "cu_seqlens" else shard(value, group, dims.get(key, 1)).contiguous()
        for key, value in given.items()
    }
    if "labels" in cut:
        cut["shift_labels"] = cut["labels"]
    return cut


def _positions(bounds: tuple[int, ...], like: Tensor) -> Tensor:
    """Positions [1, N] counted from the start of each document."""
    parts = [torch.arange(stop - start, device=like.device) for start, stop in pairwise(bounds)]
    return torch.cat(parts).unsqueeze(0)


def _shifted(labels: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """Each token's target: its successor's label within the document."""
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    ends = [stop - 1 for stop in bounds[1:] if stop > 0]
    shifted[:, ends] = IGNORE_INDEX
    return shifted
