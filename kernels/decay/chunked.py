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

Work goes block by block: a few chunks of all heads are copied head-first into tiles that stay in cache, which costs
less than strided matrix products or a transposed copy of everything. States, decays and sums are in the compute dtype
(fp32, or fp64 for fp64 inputs).

Shapes: n chunks of C tokens in a block, B batches, H states, G queries per state, M = n·B, R = G·C rows of queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.kernels.decay.scores import decay_factor, scores
from lasp.kernels.documents import Block, ChunkTable
from lasp.kernels.scratch import Scratch
from lasp.kernels.segment import Segment


@dataclass(frozen=True)
class Geometry:
    """What all stages share: the chunk table, B batches, H states of [K, V], the scale and the compute dtype.

    Without a mask there is no attention within chunks: every token reads the same state of its whole document.
    """

    table: ChunkTable
    batch: int
    heads: int
    key_dim: int
    value_dim: int
    scale: float
    dtype: torch.dtype
    masked: bool

    def new_states(self, like: Tensor) -> Tensor:
        """Memory for states [slots, B, H, K, V]."""
        shape = (self.table.slots, self.batch, self.heads, self.key_dim, self.value_dim)
        return torch.empty(shape, dtype=self.dtype, device=like.device)


@dataclass(frozen=True)
class ChunkStates:
    """States between chunks [slots, B, H, K, V] and each chunk's own transfer [slots, B or 1, H or 1, 1 or K, 1].

    Where the chain runs backwards, `states` holds gradients.
    """

    table: ChunkTable
    states: Tensor
    transfers: Tensor

    def segment(self, run: int) -> Segment:
        """The map of a whole run, forwards."""
        return Segment(self._transfer(run), self.states[self.table.runs[run][1]])

    def adjoint(self, run: int) -> Segment:
        """The map of a whole run, backwards."""
        return Segment(self._transfer(run), self.states[self.table.runs[run][0]])

    def _transfer(self, run: int) -> Tensor:
        first, last = self.table.runs[run]
        return self.transfers[first:last].prod(0)

    def enter(self, incoming: list[Tensor | None]) -> None:
        """Add to every state of each run what the state [B, H, K, V] entering the run has become by then, in place."""
        for (first, last), carry in zip(self.table.runs, incoming, strict=True):
            if carry is not None:
                self.states[first].add_(carry)
                for slot in range(first, last):
                    carry = carry * self.transfers[slot]
                    self.states[slot + 1].add_(carry)

    def enter_backwards(self, incoming: list[Tensor | None]) -> None:
        """The same for gradients [B, H, K, V] that enter each run at its end."""
        for (first, last), carry in zip(self.table.runs, incoming, strict=True):
            if carry is not None:
                self.states[last].add_(carry)
                for slot in reversed(range(first, last)):
                    carry = carry * self.transfers[slot]
                    self.states[slot].add_(carry)

    def fill(self, runs: list[Tensor]) -> None:
        """Make every state of each run the given one [B, H, K, V]: attention without a mask."""
        for (first, last), state in zip(self.table.runs, runs, strict=True):
            self.states[first : last + 1] = state

    def starts(self) -> list[Tensor]:
        """The state [B, H, K, V] at the start of each run."""
        return [self.states[first] for first, _ in self.table.runs]

    def ends(self) -> list[Tensor]:
        """The state [B, H, K, V] at the end of each run."""
        return [self.states[last] for _, last in self.table.runs]

    def entering(self, block: Block) -> Tensor:
        """The states at the start of the block's chunks, [M·H, K, V]."""
        return self.states[block.slot : block.slot + block.chunks].flatten(0, 2)

    def leaving(self, block: Block) -> Tensor:
        """The states at the end of the block's chunks, [M·H, K, V]."""
        return self.states[block.slot + 1 : block.slot + 1 + block.chunks].flatten(0, 2)


@dataclass(frozen=True)
class Gradients:
    """Accumulators in the compute dtype, shaped like the inputs; log_decay's is [B, T, H, 1 or K] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None


# Forward ------------------------------------------------------------------------------------------------------------


def chunk_states(k: Tensor, v: Tensor, log_decay: Tensor | None, geometry: Geometry) -> ChunkStates:
    """The states between chunks, each run from an empty memory, and the transfer of each chunk."""
    table = geometry.table
    chain = ChunkStates(table, geometry.new_states(k), _new_transfers(k, log_decay, geometry))
    states, transfers = chain.states, chain.transfers
    for first, _ in table.runs:
        states[first].zero_()
    for block, scratch in _blocks(geometry, k):
        gates = _gates(log_decay, block, geometry)
        keys = _read(k, block, geometry, scratch, _to_end(gates))
        values = _read(v, block, geometry, scratch)
        torch.bmm(keys.mT, values, out=chain.leaving(block))
        if gates is not None:
            transfers[block.slot : block.slot + block.chunks] = _whole(gates).mT
        for slot in range(block.slot, block.slot + block.chunks):
            states[slot + 1].addcmul_(transfers[slot], states[slot])
    return chain


def inside(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, geometry: Geometry) -> Tensor:
    """Outputs [B, T, Ho, V] of attention within each chunk, in the compute dtype."""
    shape = (*q.shape[:2], max(geometry.heads, q.shape[2]), geometry.value_dim)
    if not geometry.masked:
        return torch.zeros(shape, dtype=geometry.dtype, device=q.device)
    output = torch.empty(shape, dtype=geometry.dtype, device=q.device)
    for block, scratch in _blocks(geometry, q):
        queries, keys, values = (_read(x, block, geometry, scratch) for x in (q, k, v))
        p = scores(queries, keys, _gates(log_decay, block, geometry), geometry.scale, scratch).values
        _write(output, scratch.product(p, values), block)
    return output


def read_out(q: Tensor, log_decay: Tensor | None, entered: ChunkStates, output: Tensor, geometry: Geometry) -> None:
    """Add to `output` what each chunk's queries read from the state that entered the chunk."""
    scale = _scale(q, geometry)
    for block, scratch in _blocks(geometry, q):
        from_start = _from_start(_gates(log_decay, block, geometry), scale)
        queries = _read(q, block, geometry, scratch, from_start)
        _add(output, scratch.product(queries, entered.entering(block)), block)


# Backward -----------------------------------------------------------------------------------------------------------


def adjoint_states(
    q: Tensor, grad: Tensor, log_decay: Tensor | None, transfers: Tensor, geometry: Geometry
) -> ChunkStates:
    """Gradients of the states between chunks, each run with nothing after it. grad: of the output, [B, T, Ho, V]."""
    chain = ChunkStates(geometry.table, geometry.new_states(q), transfers)
    states, scale = chain.states, _scale(q, geometry)
    for _, last in geometry.table.runs:
        states[last].zero_()
    for block, scratch in _blocks(geometry, q, reverse=True):
        from_start = _from_start(_gates(log_decay, block, geometry), scale)
        queries, grads = _read(q, block, geometry, scratch, from_start), _read(grad, block, geometry, scratch)
        torch.bmm(queries.mT, grads, out=chain.entering(block))
        for slot in reversed(range(block.slot, block.slot + block.chunks)):
            states[slot].addcmul_(transfers[slot], states[slot + 1])
    return chain


def grad_outputs(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], grad: Tensor, entered: ChunkStates, geometry: Geometry
) -> Gradients:
    """Gradients of `inside` and `read_out`: all of dq, and of dk, dv what stays within chunks."""
    q, k, v, log_decay = inputs
    total, scale = _new_gradients(q, k, v, log_decay, geometry), _scale(q, geometry)
    for block, scratch in _blocks(geometry, q):
        gates = _gates(log_decay, block, geometry)
        queries, grads = _read(q, block, geometry, scratch), _read(grad, block, geometry, scratch)
        dq = _times(scratch.product(grads, entered.entering(block).mT), _from_start(gates, scale))
        if total.log_decay is not None and gates is not None:
            reads = _by_gate(torch.mul(queries, dq, out=scratch(*dq.shape)), gates)
            _write(total.log_decay, reads.flip(-2).cumsum(-2).flip(-2), block)
        if geometry.masked:
            keys, values = _read(k, block, geometry, scratch), _read(v, block, geometry, scratch)
            p = scores(queries, keys, gates, geometry.scale, scratch)
            _write(total.v, scratch.product(p.values.mT, grads), block)
            dq_inside, dk, dgates = p.backward(scratch.product(grads, values.mT))
            dq.add_(dq_inside)
            _write(total.k, dk, block)
            if total.log_decay is not None and dgates is not None:
                _add(total.log_decay, dgates, block)
        _write(total.q, dq, block)
    return total


def grad_chunk_states(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    entered: ChunkStates,
    adjoint: ChunkStates,
    total: Gradients,
    geometry: Geometry,
) -> None:
    """Add the gradients of `chunk_states`, given the true states and their true gradients."""
    _, k, v, log_decay = inputs
    for block, scratch in _blocks(geometry, k):
        gates, dstate = _gates(log_decay, block, geometry), adjoint.leaving(block)
        to_end = _to_end(gates)
        keys, values = _read(k, block, geometry, scratch), _read(v, block, geometry, scratch)
        dk = _times(scratch.product(values, dstate.mT), to_end)
        _add(total.k, dk, block)
        if gates is not None and total.log_decay is not None:
            # A gate is passed by the tokens before it, which are kept to the chunk's end, and by the state that entered
            # the chunk. The latter, state times gradient, taken at every chunk, replaces the boundary term of the
            # identity over the whole sequence (GLA, arXiv:2312.06635, appendix C).
            kept = _by_gate(dk.mul_(keys), gates)
            held = torch.mul(entered.entering(block), dstate, out=scratch(*dstate.shape)).sum(-1).unsqueeze(1)
            passed = _whole(gates).flatten(0, 1) * _by_gate(held, gates)
            _add(total.log_decay, passed + F.pad(kept.cumsum(-2), (0, 0, 1, -1)), block)
        _add(total.v, scratch.product(_times(keys, to_end), dstate), block)


def _by_gate(product: Tensor, gates: Tensor) -> Tensor:
    """A product [M·H, R, K] summed over what shares one gate, as [M, H, C, 1 or K] (or one row instead of C)."""
    if gates.shape[-1] == 1:
        product = product.sum(-1, keepdim=True)
    if product.shape[1] > gates.shape[-2]:
        product = product.unflatten(1, (-1, gates.shape[-2])).sum(1)
    return product.unflatten(0, (-1, gates.shape[2]))


# Decays of a block ---------------------------------------------------------------------------------------------------


def _gates(log_decay: Tensor | None, block: Block, geometry: Geometry) -> Tensor | None:
    """A block of log-decays as [n or 1, B or 1, H, C, 1 or K]."""
    if log_decay is None:
        return None
    if log_decay.dim() == 1:
        per_head = log_decay.to(geometry.dtype).repeat_interleave(geometry.heads // log_decay.shape[0])
        return per_head.view(1, 1, -1, 1, 1).expand(-1, -1, -1, block.length, -1)
    view = _block_view(log_decay.unsqueeze(-1) if log_decay.dim() == 3 else log_decay, block, geometry.heads)
    return view.to(geometry.dtype).flatten(2, 3)


def _from_start(gates: Tensor | None, scale: Tensor) -> Tensor:
    """The scale times the decay between the chunk's start and each token, that token's own included."""
    return scale if gates is None else decay_factor(gates.cumsum(-2)).mul_(scale)


def _to_end(gates: Tensor | None) -> Tensor | None:
    """The decay between each token and the chunk's end: summed from behind, for a difference would cancel."""
    if gates is None:
        return None
    later = gates.flip(-2).cumsum(-2).flip(-2)
    return decay_factor(F.pad(later[..., 1:, :], (0, 0, 0, 1)))


def _whole(gates: Tensor) -> Tensor:
    """The decay over the whole chunk, [n or 1, B or 1, H, 1, 1 or K]."""
    return decay_factor(gates.sum(-2, keepdim=True))


def _scale(like: Tensor, geometry: Geometry) -> Tensor:
    """The scale as a tensor [1]: it lifts a product with bf16 to the compute dtype, a Python number would not."""
    return torch.full((1,), geometry.scale, dtype=geometry.dtype, device=like.device)


# Tiles --------------------------------------------------------------------------------------------------------------


def _block_view(x: Tensor, block: Block, states: int) -> Tensor:
    """A block of [B, T, h, D] as [n, B, a, b, C, D]: a·b heads, or states when fewer heads than states are given."""
    part = x[:, block.start : block.stop].unflatten(1, (block.chunks, block.length)).permute(1, 0, 3, 2, 4)
    heads = x.shape[2]
    if heads > states:
        return part.unflatten(2, (states, heads // states))
    return part.unsqueeze(3).expand(-1, -1, -1, states // heads, -1, -1)


def _blocks(geometry: Geometry, like: Tensor, reverse: bool = False) -> Iterator[tuple[Block, Scratch]]:
    """The blocks in order, each with the memory for its tiles."""
    scratch = Scratch(geometry.dtype, like.device)
    for block in reversed(geometry.table.blocks) if reverse else geometry.table.blocks:
        scratch.rewind()
        yield block, scratch


def _read(x: Tensor, block: Block, geometry: Geometry, scratch: Scratch, factor: Tensor | None = None) -> Tensor:
    """A block of [B, T, h, D] as a tile [M·H, R, D] in the compute dtype, times `factor` [.., H, C, 1 or D] or [1]."""
    view = _block_view(x, block, geometry.heads)
    tile = scratch(*view.shape)
    if factor is None:
        tile.copy_(view)
    else:
        torch.mul(view, _over_heads(factor, view, geometry.heads), out=tile)
    return tile.view(block.chunks * geometry.batch * geometry.heads, -1, x.shape[-1])


def _over_heads(factor: Tensor, view: Tensor, states: int) -> Tensor:
    """A factor per state, [.., H, C, D] or [1], shaped to multiply a block view [n, B, a, b, C, D]."""
    if factor.dim() == 1:
        return factor
    return factor.unsqueeze(3) if view.shape[2] == states else factor.unflatten(2, view.shape[2:4])


def _times(tile: Tensor, factor: Tensor | None) -> Tensor:
    """Multiply a tile [M·H, R, D] in place by a factor [.., H, C, 1 or D] or [1]."""
    if factor is None:
        return tile
    if factor.dim() == 1:
        return tile.mul_(factor)
    batch, heads, length = factor.shape[1:4]
    tile.view(-1, batch, heads, tile.shape[1] // length, length, tile.shape[-1]).mul_(factor.unsqueeze(3))
    return tile


def _write(total: Tensor, tile: Tensor, block: Block) -> None:
    """Put a tile into its block of [B, T, h, D], summed over the states that share one of the h heads."""
    _block_view(total, block, total.shape[2])[:, :, :, 0].copy_(_by_head(tile, total, block))


def _add(total: Tensor, tile: Tensor, block: Block) -> None:
    """Add a tile to its block of [B, T, h, D]."""
    _block_view(total, block, total.shape[2])[:, :, :, 0].add_(_by_head(tile, total, block))


def _by_head(tile: Tensor, total: Tensor, block: Block) -> Tensor:
    """A tile as [n, B, h, C, D]."""
    heads = total.shape[2]
    tile = tile.view(block.chunks, total.shape[0], -1, block.length, tile.shape[-1])
    return tile if tile.shape[2] == heads else tile.unflatten(2, (heads, -1)).sum(3)


# Accumulators -------------------------------------------------------------------------------------------------------


def _new_transfers(like: Tensor, log_decay: Tensor | None, geometry: Geometry) -> Tensor:
    """Ones [slots, B or 1, H or 1, 1 or K, 1], of the smallest shape that the kind of decay allows."""
    shape = (1, 1, 1)
    if log_decay is not None:
        batch = 1 if log_decay.dim() == 1 else geometry.batch
        shape = (batch, geometry.heads, log_decay.shape[3] if log_decay.dim() == 4 else 1)
    return torch.ones((geometry.table.slots, *shape, 1), dtype=geometry.dtype, device=like.device)


def _new_gradients(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, geometry: Geometry) -> Gradients:
    gates = None
    if log_decay is not None:
        heads = log_decay.shape[0] if log_decay.dim() == 1 else log_decay.shape[2]
        channels = log_decay.shape[3] if log_decay.dim() == 4 else 1
        gates = torch.empty((*q.shape[:2], heads, channels), dtype=geometry.dtype, device=q.device)
    dq, dk, dv = (torch.empty_like(x, dtype=geometry.dtype) for x in (q, k, v))
    # Without a mask there is nothing within chunks to begin with.
    return Gradients(dq, dk if geometry.masked else dk.zero_(), dv if geometry.masked else dv.zero_(), gates)
