"""The stages of a recurrence over all its blocks, each an operator.

Three stages each way, so that a scan over ranks can travel between the first and the last (LASP-2, arXiv:2502.07563,
algorithms 2 and 3):

    forward    chunk_states       states between chunks, from an empty memory     reads k, v
               inside             all that needs no entering state               reads q, k, v
               read_out           what the state entering each chunk adds        reads q
    backward   adjoint_states     gradients of the states, from no later tokens  reads q, do
               grad_outputs       gradients of inside and read_out               reads q, k, v, do
               grad_chunk_states  what the true gradients of the states add      reads k, v

(those of the delta family read beta too, and k where q is read). Where nothing travels, `forward` and `backward` run
the same stages block by block, so that a block's tiles are read once, and the gradients of states live for one block
only. States, decays and sums are in the compute dtype (fp32, or fp64 for fp64 inputs). What a block computes is in
`decay.py` and `delta.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.kernels.chunks import Block
from lasp.kernels.inputs import Gradients, Inputs
from lasp.kernels.operators import operator
from lasp.kernels.portable.chain import ChunkChain
from lasp.kernels.portable.decay import Decay
from lasp.kernels.portable.delta import Delta
from lasp.kernels.portable.scratch import Scratch
from lasp.kernels.portable.stretch import Stretch
from lasp.kernels.portable.tiles import Geometry, Tiles, each
from lasp.kernels.precision import compute_dtype


class Numbers(NamedTuple):
    """What a `Geometry` knows beside the shapes of the inputs; runs: each one's offset and length, in one row."""

    runs: Sequence[int]
    heads: int
    scale: float
    masked: bool
    size: int
    trained: bool

    def geometry(self, inputs: Inputs) -> Geometry:
        """The geometry of these inputs."""
        q, v = inputs.q, inputs.v
        return Geometry(
            tuple(zip(self.runs[::2], self.runs[1::2], strict=True)),
            self.size,
            batch=q.shape[0],
            heads=self.heads,
            key_dim=q.shape[3],
            value_dim=v.shape[3],
            scale=self.scale,
            dtype=compute_dtype(q),
            masked=self.masked,
            trained=self.trained,
        )


Filled = Iterator[list[Tensor]]


# Stages -------------------------------------------------------------------------------------------------------------


@operator
def chunk_states(inputs: Inputs, numbers: Numbers) -> Filled:
    """The states between chunks, each run from an empty memory, and the transfer of each chunk."""
    geometry = numbers.geometry(inputs)
    memory = _new_chain(inputs, geometry, maps=inputs.beta is not None)
    yield memory
    chain = _begun(memory, [None] * len(geometry.runs), geometry)
    for block in _blocks(inputs, geometry):
        block.chunk_states(chain)


@operator
def inside(inputs: Inputs, numbers: Numbers) -> Filled:
    """Outputs [B, T, Ho, V] of attention within each chunk, and of the delta family what reads the entering states for
    each query [B, T, Ho, K], in the compute dtype."""
    geometry = numbers.geometry(inputs)
    dims = [geometry.value_dim] if inputs.beta is None else [geometry.value_dim, geometry.key_dim]
    seen = [_new_output(inputs, geometry, geometry.dtype, dim) for dim in dims]
    yield seen
    if not geometry.masked:
        seen[0].zero_()
        return
    for block in _blocks(inputs, geometry):
        for tile, total in zip(block.ahead(), seen, strict=True):
            block.tiles.put(tile, total)


@operator
def read_out(inputs: Inputs, numbers: Numbers, chain: Sequence[Tensor], seen: Sequence[Tensor]) -> Filled:
    """The output, given the chain that entered and what `inside` found: what each chunk's queries read is added."""
    geometry = numbers.geometry(inputs)
    output = _new_output(inputs, geometry, inputs.v.dtype, geometry.value_dim)
    yield [output]
    entered = ChunkChain(geometry.slots, *chain)
    for block in _blocks(inputs, geometry):
        tiles = block.tiles
        read = block.read_out(entered) if isinstance(block, Decay) else block.read_out(entered, tiles.read(seen[1]))
        tiles.add(read, seen[0], output)


@operator
def adjoint_states(inputs: Inputs, numbers: Numbers, grad: Tensor, transfers: Tensor) -> Filled:
    """Gradients of the states between chunks, each run with nothing after it, given the output's and transfers."""
    geometry = numbers.geometry(inputs)
    states = geometry.new_states(geometry.count, inputs.q)
    yield [states]
    chain = ChunkChain(geometry.slots, states, transfers, reverse=True)
    for _, last in chain.runs:
        states[last].zero_()
    for block in _blocks(inputs, geometry, grad, reverse=True):
        block.adjoint_states(chain)


@operator
def grad_outputs(inputs: Inputs, numbers: Numbers, grad: Tensor, chain: Sequence[Tensor]) -> Filled:
    """Gradients of `inside` and `read_out`, given the output's and the chain that entered: all of dq, and of dk and dv
    what stays within chunks."""
    geometry = numbers.geometry(inputs)
    memory = _new_gradients(inputs, geometry)
    yield memory
    total, entered = gradients_of(memory, geometry.trained), ChunkChain(geometry.slots, *chain)
    for block in _blocks(inputs, geometry, grad, gates=total.log_decay):
        each(block.tiles.put, block.grad_outputs(entered), total)
    if not geometry.masked:
        for x in memory[1:3]:
            x.zero_()


@operator
def grad_chunk_states(
    inputs: Inputs, numbers: Numbers, chain: Sequence[Tensor], adjoints: Tensor, found: Sequence[Tensor]
) -> Filled:
    """All gradients but dq, given the chain that entered, the true gradients of its states, and what `grad_outputs`
    found: that of `chunk_states` is added to it."""
    geometry = numbers.geometry(inputs)
    memory = _new_gradients(inputs, geometry)[1:]
    yield memory
    entered, adjoint = (ChunkChain(geometry.slots, x, chain[1]) for x in (chain[0], adjoints))
    before, total = (gradients_of(x, geometry.trained) for x in (found, (found[0], *memory)))
    for block in _blocks(inputs, geometry, gates=total.log_decay, before=before.log_decay):
        block.add_gradients(entered, adjoint, before, total)


# All stages at once -------------------------------------------------------------------------------------------------


@operator
def forward(inputs: Inputs, numbers: Numbers, incoming: Sequence[Tensor | None]) -> Filled:
    """Output and true chain, given the state [B, H, K, V] that enters each run.

    The chain's transfers are those of the decay family alone: a chunk of the delta family makes no map where no rank
    asks for it.
    """
    geometry = numbers.geometry(inputs)
    output = _new_output(inputs, geometry, inputs.v.dtype, geometry.value_dim)
    chain = _new_chain(inputs, geometry, maps=False)
    yield [output, *chain]
    entered = _begun(chain, incoming, geometry)
    for block in _blocks(inputs, geometry):
        block.tiles.put(block.forward(entered), output)


@operator
def backward(
    inputs: Inputs, numbers: Numbers, grad: Tensor, chain: Sequence[Tensor], ends: Sequence[Tensor | None]
) -> Filled:
    """All gradients, and those of the states entering the runs, given the output's, the chain that entered and the
    gradient entering each run at its end."""
    geometry = numbers.geometry(inputs)
    memory, starts = _new_gradients(inputs, geometry), geometry.new_states(len(geometry.runs), inputs.q)
    yield [*memory, starts]
    total, entered = gradients_of(memory, geometry.trained), ChunkChain(geometry.slots, *chain)
    window = geometry.new_states(max((block.chunks for block in geometry.table.blocks), default=0) + 1, grad)
    adjoint = ChunkChain(geometry.slots, window, entered.transfers, reverse=True)
    held, passed = window.unbind(), starts.unbind()
    for start, end in zip(passed, ends, strict=True):
        start.copy_(end) if end is not None else start.zero_()
    for block in _blocks(inputs, geometry, grad, reverse=True, gates=total.log_decay):
        own = block.tiles.block
        adjoint.base = own.slot
        held[own.chunks].copy_(passed[own.run])
        each(block.tiles.put, block.backward(entered, adjoint), total)
        passed[own.run].copy_(held[0])


# Blocks -------------------------------------------------------------------------------------------------------------


def _blocks(
    inputs: Inputs,
    geometry: Geometry,
    grad: Tensor | None = None,
    reverse: bool = False,
    gates: Tensor | None = None,
    before: Tensor | None = None,
) -> Iterator[Decay | Delta]:
    """The blocks in order of time, or against it, in the same memory one after the other.

    gates: where their gradient goes when a stretch is done, added to what stands in `before` if that is given.
    """
    scratch = Scratch(geometry.dtype, inputs.q.device)
    family = Decay if inputs.beta is None else Delta
    blocks = geometry.table.blocks
    for stretch in _stretches(blocks[::-1] if reverse else blocks, inputs):
        shared = Stretch(inputs, stretch, geometry.heads, geometry.scale)
        for block in stretch:
            scratch.rewind()
            yield family(Tiles(inputs, block, geometry, scratch, shared, grad))
        if gates is not None:
            shared.put_gates(gates, before)


def _stretches(blocks: Sequence[Block], inputs: Inputs) -> Iterator[list[Block]]:
    """Neighbouring blocks of one size, which share their gates; those per channel fill a block alone."""
    alone = inputs.log_decay is not None and inputs.log_decay.dim() == 4
    for _, stretch in groupby(blocks, lambda block: (block.run, block.chunks, block.length, alone and block.start)):
        yield list(stretch)


def _begun(chain: Sequence[Tensor], incoming: Sequence[Tensor | None], geometry: Geometry) -> ChunkChain:
    """A chain whose runs begin with `incoming`."""
    begun = ChunkChain(geometry.slots, *chain)
    for (first, _), state in zip(begun.runs, incoming, strict=True):
        begun.states[first] = 0 if state is None else state
    return begun


# Memory -------------------------------------------------------------------------------------------------------------


def gradients_of(tensors: Sequence[Tensor], trained: bool) -> Gradients:
    """Those that there are, in order; trained: whether that of the gates is among them."""
    q, k, v, *rest = tensors
    log_decay = rest.pop(0) if trained else None
    return Gradients(q, k, v, log_decay, *rest)


def _new_output(inputs: Inputs, geometry: Geometry, dtype: torch.dtype, dim: int) -> Tensor:
    q = inputs.q
    shape = (*q.shape[:2], max(geometry.heads, q.shape[2]), dim)
    return torch.empty(shape, dtype=dtype, device=q.device)


def _new_chain(inputs: Inputs, geometry: Geometry, maps: bool) -> list[Tensor]:
    """Memory for states, and for transfers: dense maps, or of the smallest shape that the gates allow, where 1 is no
    decay."""
    states, log_decay = geometry.new_states(geometry.count, inputs.q), inputs.log_decay
    if maps:
        return [states, geometry.new_states(geometry.count, inputs.q, geometry.key_dim)]
    shape = (1, 1, 1)
    if log_decay is not None:
        batch = 1 if log_decay.dim() == 1 else geometry.batch
        shape = (batch, geometry.heads, log_decay.shape[3] if log_decay.dim() == 4 else 1)
    return [states, torch.ones((geometry.count, *shape, 1), dtype=geometry.dtype, device=states.device)]


def _new_gradients(inputs: Inputs, geometry: Geometry) -> list[Tensor]:
    """Memory for those that there are."""
    q, log_decay, beta = inputs.q, inputs.log_decay, inputs.beta
    shapes = [x.shape for x in inputs[:3]]
    if geometry.trained and log_decay is not None:
        heads = log_decay.shape[0] if log_decay.dim() == 1 else log_decay.shape[2]
        shapes.append(torch.Size((*q.shape[:2], heads, log_decay.shape[3] if log_decay.dim() == 4 else 1)))
    if beta is not None:
        # Per state, for on the way v holds gradients of what each state is written.
        shapes[2] = torch.Size((*q.shape[:2], geometry.heads, geometry.value_dim))
    memory = [torch.empty(shape, dtype=geometry.dtype, device=q.device) for shape in shapes]
    # Within chunks there is no gradient of beta.
    return memory if beta is None else [*memory, memory[0].new_zeros((*beta.shape, 1))]
