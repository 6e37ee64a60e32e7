"""The decay family chunk by chunk in plain PyTorch: any device, any float dtype.

    S_t = diag(exp(log_decay_t))·S_{t-1} + k_t v_t^T,    o_t = scale·S_t^T q_t

Three stages each way, so that a scan over ranks can travel between the first and the last (LASP-2, arXiv:2502.07563,
algorithms 2 and 3; the chunk form is that of Lightning Attention-2, arXiv:2401.04658, and GLA, arXiv:2312.06635):

    forward    chunk_states       states between chunks, from an empty memory     reads k, v
               inside             attention within each chunk                    reads q, k, v
               read_out           what the state entering each chunk adds        reads q
    backward   adjoint_states     gradients of the states, from no later tokens  reads q, do
               grad_outputs       gradients of inside and read_out               reads q, k, v, do
               grad_chunk_states  what the true gradients of the states add      reads k, v

Where nothing travels, `forward` and `backward` run the same stages block by block, so that a block's tiles are read
once, and the gradients of states live for one block only. States, decays and sums are in the compute dtype (fp32, or
fp64 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.kernels.decay.tiles import Geometry, Inputs, Tiles, add, put
from lasp.kernels.documents import Block
from lasp.kernels.scratch import Scratch
from lasp.kernels.segment import Segment, apply, transpose


@dataclass
class ChunkStates:
    """States between chunks [slots, B, H, K, V] and each chunk's own transfer [slots, B or 1, H or 1, 1 or K, 1 or K].

    Where the chain runs backwards, `states` holds gradients. runs: the first and the last slot of each; `base` is the
    slot of the first state held.
    """

    runs: tuple[tuple[int, int], ...]
    states: Tensor
    transfers: Tensor
    base: int = field(default=0, kw_only=True)

    def segment(self, run: int) -> Segment:
        """The map of a whole run, forwards."""
        return Segment(self._transfer(run), self.states[self.runs[run][1]])

    def adjoint(self, run: int) -> Segment:
        """The map of a whole run, backwards: of the gradient that enters at its end."""
        return Segment(transpose(self._transfer(run)), self.states[self.runs[run][0]])

    def _transfer(self, run: int) -> Tensor:
        first, last = self.runs[run]
        if self.transfers.shape[-1] == 1:
            return self.transfers[first:last].prod(0)
        eye = torch.eye(self.transfers.shape[-1], dtype=self.transfers.dtype, device=self.transfers.device)
        return reduce(
            lambda before, own: own @ before, self.transfers[first:last], eye.expand(self.transfers.shape[1:])
        )

    def enter(self, incoming: list[Tensor | None]) -> None:
        """Add to every state of each run what the state [B, H, K, V] entering the run has become by then."""
        self.states = self.states.clone()  # not in place: selective checkpointing may keep what an operator returned
        for (first, last), carry in zip(self.runs, incoming, strict=True):
            if carry is not None:
                self.states[first].add_(carry)
                for slot in range(first, last):
                    carry = apply(self.transfers[slot], carry)
                    self.states[slot + 1].add_(carry)

    def enter_backwards(self, incoming: list[Tensor | None]) -> None:
        """The same for gradients [B, H, K, V] that enter each run at its end."""
        self.states = self.states.clone()
        for (first, last), carry in zip(self.runs, incoming, strict=True):
            if carry is not None:
                self.states[last].add_(carry)
                for slot in reversed(range(first, last)):
                    carry = apply(transpose(self.transfers[slot]), carry)
                    self.states[slot].add_(carry)

    def fill(self, runs: list[Tensor]) -> None:
        """Make every state of each run the given one [B, H, K, V]: attention without a mask."""
        counts = (last + 1 - first for first, last in self.runs)
        self.states = torch.cat([x.expand(n, *x.shape) for n, x in zip(counts, runs, strict=True)])

    def starts(self) -> list[Tensor]:
        """The state [B, H, K, V] at the start of each run."""
        return [self.states[first] for first, _ in self.runs]

    def ends(self) -> list[Tensor]:
        """The state [B, H, K, V] at the end of each run."""
        return [self.states[last] for _, last in self.runs]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """What the chain consists of."""
        return self.states, self.transfers

    def entering(self, block: Block) -> Tensor:
        """The states at the start of the block's chunks, [N, K, V]."""
        first = block.slot - self.base
        return self.states[first : first + block.chunks].flatten(0, 2)

    def leaving(self, block: Block) -> Tensor:
        """The states at the end of the block's chunks, [N, K, V]."""
        first = block.slot - self.base + 1
        return self.states[first : first + block.chunks].flatten(0, 2)

    def link(self, block: Block, reverse: bool = False) -> None:
        """Carry the state across the block's chunks, each of which holds what it adds by itself."""
        first = block.slot - self.base
        states = self.states[first : first + block.chunks + 1].unbind()
        transfers = self.transfers[block.slot : block.slot + block.chunks].unbind()
        steps = zip(states, transfers, states[1:], strict=False)
        for before, transfer, after in reversed(list(steps)) if reverse else steps:
            source, target = (after, before) if reverse else (before, after)
            if transfer.shape[-1] == 1:
                target.addcmul_(transfer, source)
            else:
                target.add_((transfer.mT if reverse else transfer) @ source)


class Gradients(NamedTuple):
    """Accumulators in the compute dtype, shaped like the inputs; log_decay's is [B, T, H, 1 or K] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None = None  # the delta family's, [B, T, H, 1]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], trained: bool) -> Gradients:
        """Those that there are, in this order; trained: whether that of log_decay is among them."""
        q, k, v, *gates = tensors
        log_decay = gates.pop(0) if trained else None
        return cls(q, k, v, log_decay, *gates)

    @property
    def tensors(self) -> list[Tensor]:
        """Those that there are."""
        return [x for x in self if x is not None]


class BlockGradients(NamedTuple):
    """Tiles of one block's part of each gradient, None where there is none."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    log_decay: Tensor | None = None
    beta: Tensor | None = None


BlockTiles = TypeVar("BlockTiles", bound=Tiles)
Given = Sequence[Any]  # tensors, of which some may be None
Memory = Sequence[Tensor]


class DecayStages(Generic[BlockTiles]):
    """The stages, each over all blocks; the methods that take tiles do the same for one block.

    A stage fills `memory` from the inputs and what else it is given, and reads nothing that it fills before it has.
    """

    tiles: type[Any] = Tiles

    # Stages ---------------------------------------------------------------------------------------------------------

    def chunk_states(self, inputs: Inputs, given: Given, memory: Memory, geometry: Geometry) -> None:
        """The states between chunks, each run from an empty memory, and the transfer of each chunk."""
        chain = _begun(memory, [None] * len(geometry.runs), geometry)
        for tiles in self._blocks(inputs, geometry):
            self._chunk_states(tiles, chain)

    def inside(self, inputs: Inputs, given: Given, memory: Memory, geometry: Geometry) -> None:
        """Outputs [B, T, Ho, V] of attention within each chunk, in the compute dtype."""
        (output,) = memory
        if not geometry.masked:
            output.zero_()
            return
        for tiles in self._blocks(inputs, geometry):
            put(self._inside(tiles), tiles.block, output)

    def read_out(self, inputs: Inputs, given: Given, memory: Memory, geometry: Geometry) -> None:
        """The output, given the chain that entered and `inside`: what each chunk's queries read is added to that."""
        *chain, inside = given
        (output,), entered = memory, ChunkStates(geometry.slots, *chain)
        for tiles in self._blocks(inputs, geometry):
            add(self._read_out(tiles, entered), tiles.block, inside, output)

    def adjoint_states(self, inputs: Inputs, given: Given, memory: Memory, geometry: Geometry) -> None:
        """Gradients of the states between chunks, each run with nothing after it, given the output's and transfers."""
        (grad, transfers), (states,) = given, memory
        chain = ChunkStates(geometry.slots, states, transfers)
        for _, last in chain.runs:
            states[last].zero_()
        for tiles in self._blocks(inputs, geometry, grad, reverse=True):
            self._adjoint_states(tiles, chain)

    def grad_outputs(self, inputs: Inputs, given: Given, memory: Memory, geometry: Geometry) -> None:
        """Gradients of `inside` and `read_out`, given the output's and the chain that entered: all of dq, and of dk and
        dv what stays within chunks."""
        grad, *chain = given
        total, entered = Gradients.of(memory, geometry.trained), ChunkStates(geometry.slots, *chain)
        for tiles in self._blocks(inputs, geometry, grad):
            each(put, self._grad_outputs(tiles, entered), tiles.block, total)
        if not geometry.masked:
            total.k.zero_()
            total.v.zero_()

    def grad_chunk_states(self, inputs: Inputs, given: Given, memory: Memory, geometry: Geometry) -> None:
        """All gradients but dq, given the chain that entered, the true gradients of its states, and what
        `grad_outputs` found: that of `chunk_states` is added to it."""
        states, transfers, adjoints, *found = given
        entered, adjoint = (ChunkStates(geometry.slots, x, transfers) for x in (states, adjoints))
        before, total = (Gradients.of(x, geometry.trained) for x in (found, (found[0], *memory)))
        for tiles in self._blocks(inputs, geometry):
            self._add_gradients(tiles, entered, adjoint, before, total)

    # All stages at once ---------------------------------------------------------------------------------------------

    def forward(self, inputs: Inputs, given: Given, memory: Memory, geometry: Geometry) -> None:
        """Output and true chain, given the state [B, H, K, V] that enters each run."""
        output, *chain = memory
        entered = _begun(chain, given, geometry)
        for tiles in self._blocks(inputs, geometry):
            self._chunk_states(tiles, entered)
            put(self._outputs(tiles, entered), tiles.block, output)

    def backward(self, inputs: Inputs, given: Given, memory: Memory, geometry: Geometry) -> None:
        """All gradients, and those of the states entering the runs, given the output's, the chain that entered and the
        gradient entering each run at its end."""
        (grad, states, transfers, *ends), (*found, starts) = given, memory
        total, entered = Gradients.of(found, geometry.trained), ChunkStates(geometry.slots, states, transfers)
        window = geometry.new_states(max((block.chunks for block in geometry.table.blocks), default=0) + 1, grad)
        for start, end in zip(starts, ends, strict=True):
            start.copy_(end) if end is not None else start.zero_()
        for tiles in self._blocks(inputs, geometry, grad, reverse=True):
            block = tiles.block
            adjoint = ChunkStates(geometry.slots, window, transfers, base=block.slot)
            window[block.chunks] = starts[block.run]
            self._adjoint_states(tiles, adjoint)
            starts[block.run].copy_(window[0])
            each(put, self._gradients(tiles, entered, adjoint), block, total)

    # One block ------------------------------------------------------------------------------------------------------

    def _chunk_states(self, tiles: BlockTiles, chain: ChunkStates) -> None:
        block = tiles.block
        torch.bmm(tiles.scaled(tiles.k, tiles.to_end).mT, tiles.v, out=chain.leaving(block))
        if tiles.whole is not None:
            chain.transfers[block.slot : block.slot + block.chunks] = tiles.whole.mT
        chain.link(block)

    def _inside(self, tiles: BlockTiles) -> Tensor:
        return tiles.product(tiles.scores.values, tiles.v)

    def _read_out(self, tiles: BlockTiles, entered: ChunkStates, onto: Tensor | None = None) -> Tensor:
        """What the queries read from the entering states, added to the tile `onto` if that is given."""
        queries = tiles.scaled(tiles.q, tiles.from_start)
        return tiles.product(queries, entered.entering(tiles.block), onto)

    def _outputs(self, tiles: BlockTiles, entered: ChunkStates) -> Tensor:
        return self._read_out(tiles, entered, self._inside(tiles))

    def _adjoint_states(self, tiles: BlockTiles, chain: ChunkStates) -> None:
        torch.bmm(tiles.scaled(tiles.q, tiles.from_start).mT, tiles.grad, out=chain.entering(tiles.block))
        chain.link(tiles.block, reverse=True)

    def _grad_outputs(
        self, tiles: BlockTiles, entered: ChunkStates, later: BlockGradients | None = None
    ) -> BlockGradients:
        """Gradients of reading the entering states and of what stays within chunks, added to the tiles `later`."""
        _, dk, dv, dgates, _ = BlockGradients() if later is None else later
        dq = tiles.product(tiles.grad, entered.entering(tiles.block).mT)
        dq = tiles.scaled(dq, tiles.from_start, out=dq)
        if tiles.geometry.trained:
            dgates = tiles.passed_from_start(tiles.q, dq, dgates)
        if not tiles.geometry.masked:
            return BlockGradients(dq, dk, dv, dgates)
        p = tiles.scores
        dv = tiles.product(p.values.mT, tiles.grad, dv)
        dq, dk, within = p.backward(tiles.product(tiles.grad, tiles.v_columns), tiles.geometry.trained, dq, dk)
        if dgates is not None and within is not None:
            dgates.add_(within.view_as(dgates))
        return BlockGradients(dq, dk, dv, dgates)

    def _grad_chunk_states(self, tiles: BlockTiles, entered: ChunkStates, adjoint: ChunkStates) -> BlockGradients:
        dstate = adjoint.leaving(tiles.block)
        dk = tiles.product(tiles.v_columns.mT, dstate.mT)
        dk = tiles.scaled(dk, tiles.to_end, out=dk)
        dv = tiles.product(tiles.scaled(tiles.k, tiles.to_end), dstate)
        dgates = None
        if tiles.geometry.trained and tiles.whole is not None:
            # A gate is passed by the tokens before it and by the state that entered the chunk, on their way to the
            # chunk's end. The latter, state times gradient at every chunk, stands for the boundary term of the
            # identity over the whole sequence (GLA, arXiv:2312.06635, appendix C).
            kept = F.pad(tiles.by_gate(tiles.times(tiles.k, dk)).cumsum(-2), (0, 0, 1, -1))
            passed = tiles.whole.flatten(0, 1) * tiles.held(entered.entering(tiles.block), dstate)
            dgates = kept.add_(passed)
        return BlockGradients(None, dk, dv, dgates)

    def _gradients(self, tiles: BlockTiles, entered: ChunkStates, adjoint: ChunkStates) -> BlockGradients:
        return self._grad_outputs(tiles, entered, self._grad_chunk_states(tiles, entered, adjoint))

    def _add_gradients(
        self, tiles: BlockTiles, entered: ChunkStates, adjoint: ChunkStates, before: Gradients, total: Gradients
    ) -> None:
        each(add, self._grad_chunk_states(tiles, entered, adjoint), tiles.block, before, total)

    def _blocks(
        self, inputs: Inputs, geometry: Geometry, grad: Tensor | None = None, reverse: bool = False
    ) -> Iterator[BlockTiles]:
        """The blocks in order of time, or against it, in the same memory one after the other."""
        scratch = Scratch(geometry.dtype, inputs[0].device)
        for block in reversed(geometry.table.blocks) if reverse else geometry.table.blocks:
            scratch.rewind()
            yield self.tiles(inputs, block, geometry, scratch, grad)

    # Memory ---------------------------------------------------------------------------------------------------------

    def memory(self, stage: str, inputs: Inputs, geometry: Geometry) -> list[Tensor]:
        """What a stage fills."""
        if stage == "forward":
            return [_new_output(inputs, geometry, inputs[2].dtype), *self._new_chain(inputs, geometry)]
        if stage == "backward":
            return [*self._new_gradients(inputs, geometry), geometry.new_states(len(geometry.runs), inputs[0])]
        if stage == "chunk_states":
            return self._new_chain(inputs, geometry)
        if stage == "adjoint_states":
            return [geometry.new_states(geometry.count, inputs[0])]
        if stage == "grad_outputs":
            return self._new_gradients(inputs, geometry)
        if stage == "grad_chunk_states":
            return self._new_gradients(inputs, geometry)[1:]
        return [_new_output(inputs, geometry, geometry.dtype if stage == "inside" else inputs[2].dtype)]

    def _new_chain(self, inputs: Inputs, geometry: Geometry) -> list[Tensor]:
        """Memory for states, and transfers of 1."""
        return [geometry.new_states(geometry.count, inputs[0]), self._new_transfers(inputs, geometry)]

    def _new_transfers(self, inputs: Inputs, geometry: Geometry) -> Tensor:
        """Memory for the transfers, all 1, of the smallest shape that the kind of decay allows."""
        log_decay, shape = inputs[3], (1, 1, 1)
        if log_decay is not None:
            batch = 1 if log_decay.dim() == 1 else geometry.batch
            shape = (batch, geometry.heads, log_decay.shape[3] if log_decay.dim() == 4 else 1)
        return torch.ones((geometry.count, *shape, 1), dtype=geometry.dtype, device=inputs[0].device)

    def _new_gradients(self, inputs: Inputs, geometry: Geometry) -> list[Tensor]:
        """Memory for those that there are."""
        shapes = [x.shape for x in inputs[:3]]
        if geometry.trained:
            q, log_decay = inputs[0], inputs[3]
            heads = log_decay.shape[0] if log_decay.dim() == 1 else log_decay.shape[2]
            shapes.append((*q.shape[:2], heads, log_decay.shape[3] if log_decay.dim() == 4 else 1))
        return [torch.empty(shape, dtype=geometry.dtype, device=inputs[0].device) for shape in shapes]


def each(how: Callable[..., None], tiles: BlockGradients, block: Block, *totals: Gradients) -> None:
    """Put or add each tile that there is into its block of its gradient."""
    for tile, *targets in zip(tiles, *totals, strict=True):
        if tile is not None and targets[0] is not None:
            how(tile, block, *targets)


def _begun(memory: Memory, incoming: Given, geometry: Geometry) -> ChunkStates:
    """A chain whose runs begin with `incoming`."""
    chain = ChunkStates(geometry.slots, *memory)
    for (first, _), state in zip(chain.runs, incoming, strict=True):
        chain.states[first] = 0 if state is None else state
    return chain


def _new_output(inputs: Inputs, geometry: Geometry, dtype: torch.dtype) -> Tensor:
    q = inputs[0]
    shape = (*q.shape[:2], max(geometry.heads, q.shape[2]), geometry.value_dim)
    return torch.empty(shape, dtype=dtype, device=q.device)
