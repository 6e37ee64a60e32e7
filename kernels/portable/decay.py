"""The decay family in one block of chunks.

    S_t = diag(exp(log_decay_t))·S_{t-1} + k_t v_t^T,    o_t = scale·S_t^T q_t

The chunk form is that of Lightning Attention-2 (arXiv:2401.04658) and GLA (arXiv:2312.06635).
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lasp.kernels.inputs import Gradients
from lasp.kernels.portable.chain import ChunkChain
from lasp.kernels.portable.tiles import Tiles, each


class Decay:
    """A decaying memory in one block. written: what the tokens write [N, C, V], by default their values."""

    def __init__(self, tiles: Tiles, written: Tensor | None = None) -> None:
        self.tiles, self._written = tiles, written

    @cached_property
    def v(self) -> Tensor:
        """What the tokens write, [N, C, V]."""
        return self.tiles.v if self._written is None else self._written

    # Forward ----------------------------------------------------------------------------------------------------------

    def chunk_states(self, chain: ChunkChain) -> None:
        """What each chunk adds and how it decays; then the states at its end, from the one at the block's start."""
        tiles, block = self.tiles, self.tiles.block
        torch.bmm(tiles.scaled(tiles.k, tiles.to_end).mT, self.v, out=chain.at_ends(block))
        if tiles.whole is not None:
            chain.transfers[block.slot : block.slot + block.chunks] = tiles.whole.mT
        chain.link(block)

    def inside(self) -> Tensor:
        """What queries see inside their chunk, [N, R, V]."""
        return self.tiles.product(self.tiles.scores.values, self.v)

    def ahead(self) -> tuple[Tensor, ...]:
        """What can be known before the states are."""
        return (self.inside(),)

    def read_out(self, entered: ChunkChain, onto: Tensor | None = None) -> Tensor:
        """What they read of the entering states, added to the tile `onto` if that is given."""
        tiles = self.tiles
        return tiles.product(tiles.scaled(tiles.q, tiles.from_start), entered.at_starts(tiles.block), onto)

    def outputs(self, entered: ChunkChain) -> Tensor:
        """Both."""
        return self.read_out(entered, self.inside())

    def forward(self, chain: ChunkChain) -> Tensor:
        """States and outputs, where the true state at the block's start is known."""
        self.chunk_states(chain)
        return self.outputs(chain)

    # Backward ---------------------------------------------------------------------------------------------------------

    def adjoint_states(self, adjoint: ChunkChain) -> None:
        """The gradients of the states at the chunks' starts, from the one at the block's end."""
        tiles = self.tiles
        torch.bmm(tiles.scaled(tiles.q, tiles.from_start).mT, tiles.grad, out=adjoint.at_starts(tiles.block))
        adjoint.link(tiles.block)

    def grad_outputs(self, entered: ChunkChain, later: Gradients | None = None, values: bool = True) -> Gradients:
        """Gradients of reading the entering states and of what stays within chunks, added to the tiles `later`.

        values: also of v.
        """
        tiles = self.tiles
        _, dk, dv, *_ = Gradients() if later is None else later
        dq = tiles.product(tiles.grad, entered.at_starts(tiles.block).mT)
        dq = tiles.scaled(dq, tiles.from_start, out=dq)
        if tiles.geometry.trained:
            tiles.pass_from_start(tiles.q, dq)
        if not tiles.geometry.masked:
            return Gradients(dq, dk, dv)
        p = tiles.scores
        dv = tiles.product(p.values.mT, tiles.grad, dv) if values else dv
        dq, dk, within = p.backward(tiles.product(tiles.grad, self.v.mT), tiles.geometry.trained, dq, dk)
        if within is not None:
            tiles.pass_within(within)
        return Gradients(dq, dk, dv)

    def grad_chunk_states(self, entered: ChunkChain, adjoint: ChunkChain, dv: Tensor | None = None) -> Gradients:
        """Gradients of what the chunks carry to their ends. dv: where that is known, of all that v does."""
        tiles, dstate = self.tiles, adjoint.at_ends(self.tiles.block)
        dk = tiles.product(self.v, dstate.mT)
        dk = tiles.scaled(dk, tiles.to_end, out=dk)
        dv = tiles.product(tiles.scaled(tiles.k, tiles.to_end), dstate) if dv is None else dv
        if tiles.geometry.trained:
            # What the state that entered the chunk sends across it, at every chunk, stands for the boundary term of the
            # identity over the whole sequence (GLA, arXiv:2312.06635, appendix C).
            tiles.pass_to_end(tiles.k, dk)
            tiles.pass_across(entered.at_starts(tiles.block), dstate)
        return Gradients(None, dk, dv)

    def gradients(self, entered: ChunkChain, adjoint: ChunkChain, dv: Tensor | None = None) -> Gradients:
        """Both."""
        return self.grad_outputs(entered, self.grad_chunk_states(entered, adjoint, dv), values=dv is None)

    def backward(self, entered: ChunkChain, adjoint: ChunkChain) -> Gradients:
        """All gradients, where the true gradient of the state at the block's end is known."""
        self.adjoint_states(adjoint)
        return self.gradients(entered, adjoint)

    def add_gradients(self, entered: ChunkChain, adjoint: ChunkChain, before: Gradients, total: Gradients) -> None:
        """Put into the block of `total` what stands in `before`, of grad_outputs, and grad_chunk_states."""
        each(self.tiles.add, self.grad_chunk_states(entered, adjoint), before, total)
