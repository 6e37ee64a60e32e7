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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.kernels.decay.tiles import Geometry, Inputs, Tiles, add, put
from lasp.kernels.documents import Block
from lasp.kernels.scratch import Scratch
from lasp.kernels.segment import Segment, apply, transpose


@dataclass(frozen=True)
class ChunkStates:
    """States between chunks [slots, B, H, K, V] and each chunk's own transfer [slots, B or 1, H or 1, 1 or K, 1 or K].

    Where the chain runs backwards, `states` holds gradients. `base` is the slot of the first state held.
    """

    geometry: Geometry
    states: Tensor
    transfers: Tensor
    base: int = 0

    def segment(self, run: int) -> Segment:
        """The map of a whole run, forwards."""
        return Segment(self._transfer(run), self.states[self.geometry.table.runs[run][1]])

    def adjoint(self, run: int) -> Segment:
        """The map of a whole run, backwards: of the gradient that enters at its end."""
        return Segment(transpose(self._transfer(run)), self.states[self.geometry.table.runs[run][0]])

    def _transfer(self, run: int) -> Tensor:
        first, last = self.geometry.table.runs[run]
        if self.transfers.shape[-1] == 1:
            return self.transfers[first:last].prod(0)
        eye = torch.eye(self.transfers.shape[-1], dtype=self.transfers.dtype, device=self.transfers.device)
        return reduce(
            lambda before, own: own @ before, self.transfers[first:last], eye.expand(self.transfers.shape[1:])
        )

    def enter(self, incoming: list[Tensor | None]) -> None:
        """Add to every state of each run what the state [B, H, K, V] entering the run has become by then, in place."""
        for (first, last), carry in zip(self.geometry.table.runs, incoming, strict=True):
            if carry is not None:
                self.states[first].add_(carry)
                for slot in range(first, last):
                    carry = apply(self.transfers[slot], carry)
                    self.states[slot + 1].add_(carry)

    def enter_backwards(self, incoming: list[Tensor | None]) -> None:
        """The same for gradients [B, H, K, V] that enter each run at its end."""
        for (first, last), carry in zip(self.geometry.table.runs, incoming, strict=True):
            if carry is not None:
                self.states[last].add_(carry)
                for slot in reversed(range(first, last)):
                    carry = apply(transpose(self.transfers[slot]), carry)
                    self.states[slot].add_(carry)

    def fill(self, runs: list[Tensor]) -> None:
        """Make every state of each run the given one [B, H, K, V]: attention without a mask."""
        for (first, last), state in zip(self.geometry.table.runs, runs, strict=True):
            self.states[first : last + 1] = state

    def starts(self) -> list[Tensor]:
        """The state [B, H, K, V] at the start of each run."""
        return [self.states[first] for first, _ in self.geometry.table.runs]

    def ends(self) -> list[Tensor]:
        """The state [B, H, K, V] at the end of each run."""
        return [self.states[last] for _, last in self.geometry.table.runs]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """What the chain consists of, besides its geometry."""
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


class BlockGradients(NamedTuple):
    """Tiles of one block's part of each gradient, None where there is none."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    log_decay: Tensor | None = None
    beta: Tensor | None = None


BlockTiles = TypeVar("BlockTiles", bound=Tiles)


class DecayStages(Generic[BlockTiles]):
    """The stages, each over all blocks; the methods that take tiles do the same for one block."""

    tiles: type[Any] = Tiles

    # Stages ---------------------------------------------------------------------------------------------------------

    def chunk_states(self, inputs: Inputs, geometry: Geometry) -> ChunkStates:
        """The states between chunks, each run from an empty memory, and the transfer of each chunk."""
        chain = self._new_chain(inputs, geometry, [None] * len(geometry.table.runs))
        for tiles in self._blocks(inputs, geometry):
            self._chunk_states(tiles, chain)
        return chain

    def inside(self, inputs: Inputs, geometry: Geometry) -> Tensor:
        """Outputs [B, T, Ho, V] of attention within each chunk, in the compute dtype."""
        output = _new_output(inputs, geometry)
        if not geometry.masked:
            return output.zero_()
        for tiles in self._blocks(inputs, geometry):
            put(output, self._inside(tiles), tiles.block)
        return output

    def read_out(self, inputs: Inputs, entered: ChunkStates, output: Tensor, geometry: Geometry) -> None:
        """Add to `output` what each chunk's queries read from the state that entered the chunk."""
        for tiles in self._blocks(inputs, geometry):
            add(output, self._read_out(tiles, entered), tiles.block)

    def adjoint_states(self, inputs: Inputs, grad: Tensor, entered: ChunkStates, geometry: Geometry) -> ChunkStates:
        """Gradients of the states between chunks, each run with nothing after it. grad: of the output."""
        states = geometry.new_states(geometry.table.slots, grad)
        chain = ChunkStates(geometry, states, entered.transfers)
        for _, last in geometry.table.runs:
            states[last].zero_()
        for tiles in self._blocks(inputs, geometry, grad, reverse=True):
            self._adjoint_states(tiles, chain)
        return chain

    def grad_outputs(self, inputs: Inputs, grad: Tensor, entered: ChunkStates, geometry: Geometry) -> Gradients:
        """Gradients of `inside` and `read_out`: all of dq, and of dk and dv what stays within chunks."""
        total = self._new_gradients(inputs, geometry)
        for tiles in self._blocks(inputs, geometry, grad):
            each(put, total, self._grad_outputs(tiles, entered), tiles.block)
        if not geometry.masked:
            total.k.zero_()
            total.v.zero_()
        return total

    def grad_chunk_states(
        self, inputs: Inputs, entered: ChunkStates, adjoint: ChunkStates, total: Gradients, geometry: Geometry
    ) -> None:
        """Add the gradients of `chunk_states`, given the true states and their true gradients."""
        for tiles in self._blocks(inputs, geometry):
            each(add, total, self._grad_chunk_states(tiles, entered, adjoint), tiles.block)

    # All stages at once ---------------------------------------------------------------------------------------------

    def forward(self, inputs: Inputs, incoming: list[Tensor | None], geometry: Geometry) -> tuple[Tensor, ChunkStates]:
        """Output and true states, given the state [B, H, K, V] that enters each run."""
        output, chain = _new_output(inputs, geometry), self._new_chain(inputs, geometry, incoming)
        for tiles in self._blocks(inputs, geometry):
            self._chunk_states(tiles, chain)
            put(output, self._outputs(tiles, chain), tiles.block)
        return output, chain

    def backward(
        self,
        inputs: Inputs,
        grad: Tensor,
        entered: ChunkStates,
        incoming: list[Tensor | None],
        geometry: Geometry,
    ) -> tuple[Gradients, list[Tensor]]:
        """All gradients, and that of the state entering each run, given the gradient entering each run at its end."""
        total, table = self._new_gradients(inputs, geometry), geometry.table
        window = geometry.new_states(max((block.chunks for block in table.blocks), default=0) + 1, grad)
        starts = [torch.zeros_like(window[0]) if end is None else end.clone() for end in incoming]
        for tiles in self._blocks(inputs, geometry, grad, reverse=True):
            block = tiles.block
            adjoint = ChunkStates(geometry, window, entered.transfers, base=block.slot)
            window[block.chunks] = starts[block.run]
            self._adjoint_states(tiles, adjoint)
            starts[block.run].copy_(window[0])
            each(put, total, self._gradients(tiles, entered, adjoint), block)
        return total, starts

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
        if tiles.trains_gates:
            dgates = tiles.passed_from_start(tiles.q, dq, dgates)
        if not tiles.geometry.masked:
            return BlockGradients(dq, dk, dv, dgates)
        p = tiles.scores
        dv = tiles.product(p.values.mT, tiles.grad, dv)
        dq, dk, within = p.backward(tiles.product(tiles.grad, tiles.v_columns), tiles.trains_gates, dq, dk)
        if dgates is not None and within is not None:
            dgates.add_(within.view_as(dgates))
        return BlockGradients(dq, dk, dv, dgates)

    def _grad_chunk_states(self, tiles: BlockTiles, entered: ChunkStates, adjoint: ChunkStates) -> BlockGradients:
        dstate = adjoint.leaving(tiles.block)
        dk = tiles.product(tiles.v_columns.mT, dstate.mT)
        dk = tiles.scaled(dk, tiles.to_end, out=dk)
        dv = tiles.product(tiles.scaled(tiles.k, tiles.to_end), dstate)
        dgates = None
        if tiles.trains_gates and tiles.whole is not None:
            # A gate is passed by the tokens before it and by the state that entered the chunk, on their way to the
            # chunk's end. The latter, state times gradient at every chunk, stands for the boundary term of the
            # identity over the whole sequence (GLA, arXiv:2312.06635, appendix C).
            kept = F.pad(tiles.by_gate(tiles.times(tiles.k, dk)).cumsum(-2), (0, 0, 1, -1))
            passed = tiles.whole.flatten(0, 1) * tiles.held(entered.entering(tiles.block), dstate)
            dgates = kept.add_(passed)
        return BlockGradients(None, dk, dv, dgates)

    def _gradients(self, tiles: BlockTiles, entered: ChunkStates, adjoint: ChunkStates) -> BlockGradients:
        return self._grad_outputs(tiles, entered, self._grad_chunk_states(tiles, entered, adjoint))

    def _blocks(
        self, inputs: Inputs, geometry: Geometry, grad: Tensor | None = None, reverse: bool = False
    ) -> Iterator[BlockTiles]:
        """The blocks in order of time, or against it, in the same memory one after the other."""
        scratch = Scratch(geometry.dtype, inputs[0].device)
        for block in reversed(geometry.table.blocks) if reverse else geometry.table.blocks:
            scratch.rewind()
            yield self.tiles(inputs, block, geometry, scratch, grad)

    # Memory ---------------------------------------------------------------------------------------------------------

    def _new_chain(self, inputs: Inputs, geometry: Geometry, incoming: list[Tensor | None]) -> ChunkStates:
        """States whose runs begin with `incoming`, and transfers of 1."""
        states = geometry.new_states(geometry.table.slots, inputs[0])
        for (first, _), state in zip(geometry.table.runs, incoming, strict=True):
            states[first] = 0 if state is None else state
        return ChunkStates(geometry, states, self._new_transfers(inputs, geometry))

    def _new_transfers(self, inputs: Inputs, geometry: Geometry) -> Tensor:
        """Memory for the transfers, all 1, of the smallest shape that the kind of decay allows."""
        log_decay, shape = inputs[3], (1, 1, 1)
        if log_decay is not None:
            batch = 1 if log_decay.dim() == 1 else geometry.batch
            shape = (batch, geometry.heads, log_decay.shape[3] if log_decay.dim() == 4 else 1)
        return torch.ones((geometry.table.slots, *shape, 1), dtype=geometry.dtype, device=inputs[0].device)

    def _new_gradients(self, inputs: Inputs, geometry: Geometry) -> Gradients:
        q, k, v, log_decay = inputs[:4]
        gates = None
        if log_decay is not None and log_decay.requires_grad:
            heads = log_decay.shape[0] if log_decay.dim() == 1 else log_decay.shape[2]
            channels = log_decay.shape[3] if log_decay.dim() == 4 else 1
            gates = torch.empty((*q.shape[:2], heads, channels), dtype=geometry.dtype, device=q.device)
        dq, dk, dv = (torch.empty_like(x, dtype=geometry.dtype) for x in (q, k, v))
        return Gradients(dq, dk, dv, gates)


def each(how: Callable[[Tensor, Tensor, Block], None], total: Gradients, tiles: BlockGradients, block: Block) -> None:
    """Put or add each tile that there is into its block of its gradient."""
    for target, tile in zip(total, tiles, strict=True):
        if target is not None and tile is not None:
            how(target, tile, block)


def _new_output(inputs: Inputs, geometry: Geometry) -> Tensor:
    q = inputs[0]
    shape = (*q.shape[:2], max(geometry.heads, q.shape[2]), geometry.value_dim)
    return torch.empty(shape, dtype=geometry.dtype, device=q.device)
