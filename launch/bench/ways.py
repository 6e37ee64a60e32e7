"""Ways of a model to share its sequence, which benchmarks compare: ours, and what others do on the same layers.

gather, ring, ...   scans of states (`parallel/scan.py`), and `heads`, which exchanges tokens for heads
softmax ring        linear layers computed as softmax attention by a ring of keys and values, as if they had no
                    state (Ring Attention, arXiv 2310.01889): the baseline of LASP-2
activations         every rank gathers what enters a mixer, computes its heads of the whole sequence, and outputs
                    are summed back to tokens (Megatron-LM's sequence parallelism, arXiv 2205.05198)
data parallel       nothing is shared: every rank has a sequence of its own
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import lasp
from lasp.kernels.once import once_differentiable
from lasp.layers import Mixer, RecurrentMixer
from lasp.layers.context import Context
from lasp.models import LinearLlamaForCausalLM
from lasp.models.blocks import Block
from lasp.models.tensor_parallel import Place, check_heads, cut_parameters, share_of, take_heads
from lasp.parallel import collectives
from lasp.parallel.cut import Cut
from lasp.parallel.scan import SCANS, Heads, check_scan
from lasp.wrap.swap import surround

SOFTMAX_RING, ACTIVATIONS, DATA_PARALLEL = "softmax ring", "activations", "data parallel"
WAYS = (*SCANS, Heads.name, SOFTMAX_RING, ACTIVATIONS)
"""Those that share a sequence."""


def shared(model: LinearLlamaForCausalLM, way: str, group: lasp.SequenceGroup) -> Any:
    """The model, whose mixers share the sequence of a group in this way; in place. ValueError where it cannot: heads
    that the ranks do not divide, a mixer that is no recurrence of queries and keys."""
    own: Any = lasp.parallelize(model, group, scan=check_scan(way if way in (*SCANS, Heads.name) else "gather"))
    if way == Heads.name and model.config.num_attention_heads % group.size:
        raise ValueError(f"{group.size} ranks do not divide {model.config.num_attention_heads} heads")
    mixers = [module for module in own.modules() if isinstance(module, Mixer)]
    if way == SOFTMAX_RING:
        for recurrent in (mixer for mixer in mixers if isinstance(mixer, RecurrentMixer)):
            recurrent.__dict__["recur"] = _by_softmax_ring
    if way == ACTIVATIONS and group.size > 1:
        check_heads(model.config, group.size)
        with torch.device("meta"):
            parts = [Block(share_of(model.config, group.size), index).mixer for index in range(len(mixers))]
        for mixer, part in zip(mixers, parts, strict=True):
            _gather_activations(mixer, part, group)
    return own


def _by_softmax_ring(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, context: Context, *operation: Any, **arguments: Any
) -> tuple[Tensor, None]:
    """In the place of `RecurrentMixer.recur`: as much of queries, keys and values. Gates are made, and weigh nothing:
    DDP waits for the gradient of every parameter."""
    output = lasp.softmax_attention(q, k, v, method="ring", **context.sequence)
    gates = [x for x in (log_decay, *arguments.values()) if isinstance(x, Tensor) and x.requires_grad]
    for gate in gates:
        output = output + 0 * gate.sum()
    return output, None


# Activations --------------------------------------------------------------------------------------------------------


def _gather_activations(mixer: Mixer, part: nn.Module, group: lasp.SequenceGroup) -> None:
    """Let a mixer compute this rank's heads of the whole sequence. part: one with as many, on the meta device."""
    places = list(cut_parameters(mixer, part, group.rank, group.size))
    take_heads(mixer, group.rank, group.size)
    surround(mixer, "forward", partial(_of_the_whole, places))


def _of_the_whole(
    places: list[Place], forward: Callable[..., Any], mixer: Mixer, x: Tensor, *, cut: Cut, **rest: Any
) -> tuple[Tensor, None]:
    assert cut.group is not None, "somebody shares the sequence"
    alone = _whole_cut(cut.total, cut.bounds)
    whole = lasp.unshard(x, cut=cut)
    with _own_heads(places, cut.group.rank, cut.group.size):
        output, _ = forward(mixer, whole, cut=alone)
    return _SumToTokens.apply(output, cut), None


@lru_cache(maxsize=2)
def _whole_cut(total: int, bounds: tuple[int, ...] | None) -> Cut:
    """One for all layers: it keeps what follows from it."""
    return Cut(None, (total,), bounds)


@contextmanager
def _own_heads(places: list[Place], rank: int, size: int) -> Iterator[None]:
    """Inside, a mixer has this rank's part of parameters that are whole on every rank."""
    held: list[Any] = [place.owner._parameters[place.name] for place in places]
    try:
        for place, whole in zip(places, held, strict=True):
            own = whole
            if place.index is not None:
                own = whole[place.index]
            elif place.dim is not None:
                own = whole.chunk(size, place.dim)[rank]
            place.owner._parameters[place.name] = own
        yield
    finally:
        for place, whole in zip(places, held, strict=True):
            place.owner._parameters[place.name] = whole


class _SumToTokens(torch.autograd.Function):
    """
    input      this rank's part of a sum [B, N, D], of all tokens
    output     the sum [B, T_rank, D], of its tokens
    forward    one reduce-scatter of parts padded to the longest
    backward   one all-gather of the same
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: Cut) -> Tensor:
        assert cut.group is not None, "somebody shares the sequence"
        ctx.cut = cut
        rows = x.transpose(0, 1)
        parts = rows.new_zeros(cut.size, max(cut.lengths), *rows.shape[1:])
        for p in cut.pieces:
            parts[p.rank, p.offset : p.offset + p.stop - p.start] = rows[p.start : p.stop]
        own = collectives.reduce_scatter(parts, cut.group.process_group, "forward").wait()
        return own[: cut.tokens].transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        cut = ctx.cut
        padded = grad.new_zeros(max(cut.lengths), grad.shape[0], grad.shape[2])
        padded[: cut.tokens] = grad.transpose(0, 1)
        parts = collectives.all_gather(padded, cut.group.process_group, "backward").wait()
        whole = torch.cat([parts[p.rank, p.offset : p.offset + p.stop - p.start] for p in cut.pieces])
        return whole.transpose(0, 1), None
