"""The delta family chunk by chunk in plain PyTorch: any device, any float dtype.

    S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t))·S_{t-1} + beta_t k_t v_t^T,    o_t = scale·S_t^T q_t

What a token writes, `u_t = beta_t (v_t - k_t^T diag(exp(log_decay_t))·S_{t-1})`, makes it a decaying memory of other
values, `S_t = diag(exp(log_decay_t))·S_{t-1} + k_t u_t^T`: all stages are those of the decay family, with u for v. In a
chunk that the state S enters (DeltaNet, arXiv:2406.06484, section 3.2; with gates, Gated DeltaNet, arXiv:2412.06464,
and Kimi Linear, arXiv:2510.26692),

    (I + diag(beta)·A) u = diag(beta)·(v - K' S),    A_ij = sum_c k_ic k_jc exp(G_i - G_j)_c  for i > j, else 0

where K' holds the keys decayed from the chunk's start. So u = U - W S with U and W known before S is, and the chunk
maps S to `M S + H` with a dense `M = diag(exp(G_C)) - K''^T W`, where K'' holds the keys decayed to the chunk's end.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lasp.kernels.decay.chunked import BlockGradients, ChunkStates, DecayStages, Gradients, each
from lasp.kernels.decay.scores import Scores, scores
from lasp.kernels.decay.tiles import Geometry, Inputs, Tiles, add, put


class DeltaTiles(Tiles):
    """Tiles whose values are what the tokens write, once the states that enter the chunks are known."""

    @cached_property
    def given(self) -> Tensor:
        """The values of the call, [N, C, V]."""
        return self._read(self._inputs[2])

    @cached_property
    def beta(self) -> Tensor:
        """How much of what the key held is erased, [N, C, 1]."""
        return self._read(self._inputs[4].unsqueeze(-1))

    @cached_property
    def k_scores(self) -> Scores:
        """The decayed products of keys and keys; what lies on and above the diagonal is not part of A."""
        return scores(self.k, self.k, self.gates, 1.0, self.scratch)

    @cached_property
    def a(self) -> Tensor:
        """A, [N, C, C]."""
        return self.k_scores.values.tril(-1)

    @cached_property
    def inverse(self) -> Tensor:
        """`(I + diag(beta)·A)^-1`, [N, C, C]: its entries stay below 2 as long as beta·|k|^2 does not exceed 2."""
        eye = torch.eye(self.block.length, dtype=self.a.dtype, device=self.a.device)
        return torch.linalg.solve_triangular(self.beta * self.a, eye, upper=False, unitriangular=True)

    @cached_property
    def k_from_start(self) -> Tensor:
        """K', [N, C, K]."""
        return self.k if self.gates is None else self.scaled(self.k, self.decay_from_start, self.scratch(*self.k.shape))

    @cached_property
    def written(self) -> Tensor:
        """U, [N, C, V]: what the tokens write where nothing entered the chunk."""
        return self.product(self.inverse, self.beta * self.given)

    @cached_property
    def erased(self) -> Tensor:
        """W, [N, C, K]."""
        return self.product(self.inverse, self.beta * self.k_from_start)

    def enter(self, states: Tensor) -> None:
        """Let the states [N, K, V] enter the chunks, which makes known what the tokens write."""
        self._entering = states

    @cached_property
    def v(self) -> Tensor:
        """What the tokens write, u [N, C, V]."""
        return torch.baddbmm(self.written, self.erased, self._entering, alpha=-1)

    @cached_property
    def v_columns(self) -> Tensor:
        """The same as [N, V, C]."""
        return self.v.mT.contiguous()

    def read(self, x: Tensor) -> Tensor:
        """The block's part of [B, T, h, D] as a tile [N, C, D]."""
        return self._read(x)


class DeltaStages(DecayStages[DeltaTiles]):
    """The stages of the delta family."""

    tiles = DeltaTiles

    def _chunk_states(self, tiles: DeltaTiles, chain: ChunkStates) -> None:
        block = tiles.block
        keys = tiles.scaled(tiles.k, tiles.to_end, tiles.scratch(*tiles.k.shape)).mT
        torch.bmm(keys, tiles.written, out=chain.leaving(block))
        transfers = chain.transfers[block.slot : block.slot + block.chunks]
        torch.bmm(keys, tiles.erased, out=transfers.flatten(0, 2)).neg_()
        transfers.diagonal(dim1=-2, dim2=-1).add_(1 if tiles.whole is None else tiles.whole.squeeze(-2))
        chain.link(block)

    def _inside(self, tiles: DeltaTiles) -> Tensor:
        return tiles.product(tiles.scores.values, tiles.written)

    def _read_out(self, tiles: DeltaTiles, entered: ChunkStates, onto: Tensor | None = None) -> Tensor:
        return tiles.product(self._readers(tiles), entered.entering(tiles.block), onto)

    def _outputs(self, tiles: DeltaTiles, entered: ChunkStates) -> Tensor:
        tiles.enter(entered.entering(tiles.block))
        within = tiles.product(tiles.scores.values, tiles.v)
        return super()._read_out(tiles, entered, within)

    def _adjoint_states(self, tiles: DeltaTiles, chain: ChunkStates) -> None:
        torch.bmm(self._readers(tiles).mT, tiles.grad, out=chain.entering(tiles.block))
        chain.link(tiles.block, reverse=True)

    def _readers(self, tiles: DeltaTiles) -> Tensor:
        """What reads the entering state for each query, [N, R, K]: the query itself, less what was erased by then."""
        erased = tiles.product(tiles.scores.values, tiles.erased)
        return tiles.scaled(tiles.q, tiles.from_start).sub_(erased)

    def _grad_outputs(
        self, tiles: DeltaTiles, entered: ChunkStates, later: BlockGradients | None = None
    ) -> BlockGradients:
        """As for the decay family: the gradient of v is that of what the tokens write."""
        tiles.enter(entered.entering(tiles.block))
        return super()._grad_outputs(tiles, entered, later)

    def _grad_chunk_states(self, tiles: DeltaTiles, entered: ChunkStates, adjoint: ChunkStates) -> BlockGradients:
        """Likewise."""
        tiles.enter(entered.entering(tiles.block))
        return super()._grad_chunk_states(tiles, entered, adjoint)

    def _gradients(self, tiles: DeltaTiles, entered: ChunkStates, adjoint: ChunkStates) -> BlockGradients:
        return self._grad_written(tiles, entered, super()._gradients(tiles, entered, adjoint))

    def _add_gradients(
        self, tiles: DeltaTiles, entered: ChunkStates, adjoint: ChunkStates, before: Gradients, total: Gradients
    ) -> None:
        """`before.v` holds gradients of what the tokens write, `total.v` those of v."""
        found = self._grad_chunk_states(tiles, entered, adjoint)
        assert found.v is not None, "every chunk has values"
        found = self._grad_written(tiles, entered, found._replace(v=found.v.add_(tiles.read(before.v))))
        each(put, BlockGradients(v=found.v), tiles.block, total)
        each(add, found._replace(v=None), tiles.block, before, total)

    def _grad_written(self, tiles: DeltaTiles, entered: ChunkStates, found: BlockGradients) -> BlockGradients:
        """From the gradient of what the tokens write, du, to those of v, beta, k and the gates.

        With y = (I + diag(beta)·A)^-T du:  dv = beta·y,  dbeta = y·(v - K' S - A u),  dK' = -dv S^T,  dA = -dv u^T.
        """
        assert found.k is not None, "every chunk has keys"
        assert found.v is not None, "every chunk has values"
        states = entered.entering(tiles.block)
        y = tiles.product(tiles.inverse.mT, found.v)
        error = torch.baddbmm(tiles.given, tiles.k_from_start, states, alpha=-1)
        error = torch.baddbmm(error, tiles.a, tiles.v, out=error, alpha=-1)
        dbeta = torch.linalg.vecdot(y, error).unsqueeze(-1)
        dv = y.mul_(tiles.beta)
        dk = tiles.product(dv, states.mT).neg_()
        dk = tiles.scaled(dk, tiles.decay_from_start, out=dk)
        dgates = found.log_decay
        if tiles.geometry.trained:
            dgates = tiles.passed_from_start(tiles.k, dk, dgates)
        da = tiles.product(dv, tiles.v_columns).neg_().tril_(-1)
        dk.add_(found.k)
        _, _, within = tiles.k_scores.backward(da, tiles.geometry.trained, dk, dk)  # k stands on both sides
        if dgates is not None and within is not None:
            dgates.add_(within.view_as(dgates))
        return BlockGradients(found.q, dk, dv, dgates, dbeta)

    def _new_transfers(self, inputs: Inputs, geometry: Geometry) -> Tensor:
        return geometry.new_states(geometry.count, inputs[0], geometry.key_dim)

    def _new_gradients(self, inputs: Inputs, geometry: Geometry) -> list[Tensor]:
        q, k, v, *gates = super()._new_gradients(inputs, geometry)
        # Per state, for on the way v holds gradients of what each state is written.
        dv = v.new_empty((*v.shape[:2], geometry.heads, geometry.value_dim))
        return [q, k, dv, *gates, v.new_zeros((*inputs[4].shape, 1))]
