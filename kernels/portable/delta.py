"""The delta family in one block of chunks.

    S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t))·S_{t-1} + beta_t k_t v_t^T,    o_t = scale·S_t^T q_t

What a token writes, `u_t = beta_t (v_t - k_t^T diag(exp(log_decay_t))·S_{t-1})`, makes it a decaying memory of other
values, `S_t = diag(exp(log_decay_t))·S_{t-1} + k_t u_t^T`: what the decay family does, with u for v. In a chunk that
the state S enters (DeltaNet, arXiv:2406.06484, section 3.2; with gates, Gated DeltaNet, arXiv:2412.06464, and Kimi
Linear, arXiv:2510.26692),

    (I + diag(beta)·A) u = diag(beta)·(v - K' S),    A_ij = sum_c k_ic k_jc exp(G_i - G_j)_c  for i > j, else 0

where K' holds the keys decayed from the chunk's start. So u = U - W S with U and W known before S is, and the chunk
maps S to `M S + H` with a dense `M = diag(exp(G_C)) - K''^T W`, where K'' holds the keys decayed to the chunk's end.
Maps are for ranks: where S is known, `diag(exp(G_C))·S + K''^T u` from chunk to chunk takes two thirds of the products.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from lasp.kernels.inputs import Gradients
from lasp.kernels.portable.chain import ChunkChain
from lasp.kernels.portable.decay import Decay
from lasp.kernels.portable.scores import Scores
from lasp.kernels.portable.tiles import Tiles, each


class Delta:
    """A memory that erases, in one block: a triangular system per chunk, and with what enters it a decaying memory."""

    def __init__(self, tiles: Tiles) -> None:
        self.tiles = tiles

    def memory(self, entered: ChunkChain) -> Decay:
        """The decaying memory of what the tokens write, u = U - W S, where these states enter the chunks."""
        states = entered.at_starts(self.tiles.block)
        return Decay(self.tiles, torch.baddbmm(self.written, self.erased, states, alpha=-1))

    # The system of each chunk -----------------------------------------------------------------------------------------

    @cached_property
    def beta(self) -> Tensor:
        """How much of what the key held is erased, [N, C, 1]."""
        beta = self.tiles.inputs.beta
        assert beta is not None, "it is what makes a call one of this family"
        return self.tiles.read(beta)

    @cached_property
    def k_scores(self) -> Scores:
        """The decayed products of keys and keys; what lies on and above the diagonal is not part of A."""
        return self.tiles.scores_of(self.tiles.k, 1.0)

    @cached_property
    def a(self) -> Tensor:
        """A, [N, C, C]."""
        return self.k_scores.values.tril(-1)

    @cached_property
    def inverse(self) -> Tensor:
        """`(I + diag(beta)·A)^-1`, [N, C, C]: its entries stay below 2 as long as beta·|k|^2 does not exceed 2."""
        eye = torch.eye(self.tiles.block.length, dtype=self.a.dtype, device=self.a.device)
        return torch.linalg.solve_triangular(self.beta * self.a, eye, upper=False, unitriangular=True)

    @cached_property
    def k_from_start(self) -> Tensor:
        """K', [N, C, K]."""
        tiles, k = self.tiles, self.tiles.k
        return k if tiles.gates is None else tiles.scaled(k, tiles.key_from_start, tiles.scratch(*k.shape))

    @cached_property
    def k_to_end(self) -> Tensor:
        """K'', [N, C, K]."""
        tiles, k = self.tiles, self.tiles.k
        return k if tiles.gates is None else tiles.scaled(k, tiles.to_end, tiles.scratch(*k.shape))

    @cached_property
    def written(self) -> Tensor:
        """U, [N, C, V]: what the tokens write where nothing entered the chunk."""
        return self.tiles.product(self.inverse, self.beta * self.tiles.v)

    @cached_property
    def erased(self) -> Tensor:
        """W, [N, C, K]."""
        return self.tiles.product(self.inverse, self.beta * self.k_from_start)

    # Forward, as in `Decay` -------------------------------------------------------------------------------------------

    def chunk_states(self, chain: ChunkChain) -> None:
        """What each chunk adds by itself and its map; then the states at its end, from the one at the block's start."""
        tiles, block, keys = self.tiles, self.tiles.block, self.k_to_end.mT
        torch.bmm(keys, self.written, out=chain.at_ends(block))
        transfers = chain.transfers[block.slot : block.slot + block.chunks]
        torch.bmm(keys, self.erased, out=transfers.flatten(0, 2)).neg_()
        transfers.diagonal(dim1=-2, dim2=-1).add_(1 if tiles.whole is None else tiles.whole.squeeze(-2))
        chain.link(block)

    def ahead(self) -> tuple[Tensor, ...]:
        """What can be known before the states are: what queries see inside their chunk where nothing entered it
        [N, R, V], and what reads the entering state for them [N, R, K]."""
        return self.tiles.product(self.tiles.scores.values, self.written), self._readers()

    def read_out(self, entered: ChunkChain, readers: Tensor) -> Tensor:
        """What the entering states add to that."""
        return self.tiles.product(readers, entered.at_starts(self.tiles.block))

    def forward(self, chain: ChunkChain) -> Tensor:
        """States and outputs, where the true state at the block's start is known. Makes no maps."""
        tiles, states = self.tiles, chain.around(self.tiles.block)
        u = tiles.scratch(*self.written.shape)
        written, u_by_chunk, erased, keys = map(tiles.by_chunk, (self.written, u, self.erased, self.k_to_end))
        for i, state in enumerate(states[:-1]):
            torch.baddbmm(written[i], erased[i], state, alpha=-1, out=u_by_chunk[i])
            torch.baddbmm(self._over_chunk(i, state), keys[i].mT, u_by_chunk[i], out=states[i + 1])
        return Decay(tiles, u).outputs(chain)

    # Backward ---------------------------------------------------------------------------------------------------------

    def adjoint_states(self, adjoint: ChunkChain) -> None:
        """The gradients of the states at the chunks' starts, from the one at the block's end."""
        torch.bmm(self._readers().mT, self.tiles.grad, out=adjoint.at_starts(self.tiles.block))
        adjoint.link(self.tiles.block)

    def grad_outputs(self, entered: ChunkChain) -> Gradients:
        """Gradients of outputs given what the tokens write; that of v is of what they write."""
        return self.memory(entered).grad_outputs(entered)

    def backward(self, entered: ChunkChain, adjoint: ChunkChain) -> Gradients:
        """All gradients, where the true gradient of the state at the block's end is known.

        With du = P^T do + K'' dS of what the tokens write, `dS <- diag(exp(G_C))·dS + Q'^T do - W^T du`.
        """
        tiles, grads = self.tiles, adjoint.around(self.tiles.block)
        torch.bmm(tiles.scaled(tiles.q, tiles.from_start).mT, tiles.grad, out=adjoint.at_starts(tiles.block))
        du = tiles.product(tiles.scores.values.mT, tiles.grad)
        du_by_chunk, erased, keys = map(tiles.by_chunk, (du, self.erased, self.k_to_end))
        for i, grad in reversed(list(enumerate(grads[1:]))):
            torch.baddbmm(du_by_chunk[i], keys[i], grad, out=du_by_chunk[i])
            grads[i].add_(self._over_chunk(i, grad))
            torch.baddbmm(grads[i], erased[i].mT, du_by_chunk[i], alpha=-1, out=grads[i])
        memory = self.memory(entered)
        return self._grad_written(memory, memory.gradients(entered, adjoint, du), entered)

    def add_gradients(self, entered: ChunkChain, adjoint: ChunkChain, before: Gradients, total: Gradients) -> None:
        """`before.v` holds gradients of what the tokens write, `total.v` those of v."""
        memory = self.memory(entered)
        found = memory.grad_chunk_states(entered, adjoint)
        assert found.v is not None, "every chunk has values"
        assert before.v is not None, "grad_outputs has found it"
        found = self._grad_written(memory, found._replace(v=found.v.add_(self.tiles.read(before.v))), entered)
        each(self.tiles.put, Gradients(v=found.v), total)
        each(self.tiles.add, found._replace(v=None), before, total)

    def _over_chunk(self, i: int, state: Tensor) -> Tensor:
        """A state [B·H, K, V] decayed over the block's i-th chunk."""
        whole = self.tiles.whole
        if whole is None:
            return state
        batch, heads = self.tiles.geometry.batch, self.tiles.geometry.heads
        decay = whole[i if len(whole) > 1 else 0].mT.expand(batch, heads, -1, 1).flatten(0, 1)
        return torch.mul(state, decay, out=self.tiles.scratch.temporary(*state.shape))

    def _readers(self) -> Tensor:
        """What reads the entering state for each query, [N, R, K]: the query itself, less what was erased by then."""
        tiles = self.tiles
        erased = tiles.product(tiles.scores.values, self.erased)
        return tiles.scaled(tiles.q, tiles.from_start).sub_(erased)

    def _grad_written(self, memory: Decay, found: Gradients, entered: ChunkChain) -> Gradients:
        """From the gradient of what the tokens write, du, to those of v, beta, k and the gates.

        With y = (I + diag(beta)·A)^-T du:  dv = beta·y,  dbeta = y·(v - K' S - A u),  dK' = -dv S^T,  dA = -dv u^T.
        """
        assert found.k is not None, "every chunk has keys"
        assert found.v is not None, "every chunk has values"
        tiles, states = self.tiles, entered.at_starts(self.tiles.block)
        y = tiles.product(self.inverse.mT, found.v)
        error = torch.baddbmm(tiles.v, self.k_from_start, states, alpha=-1)
        error = torch.baddbmm(error, self.a, memory.v, out=error, alpha=-1)
        dbeta = torch.linalg.vecdot(y, error).unsqueeze(-1)
        dv = y.mul_(self.beta)
        dk = tiles.product(dv, states.mT).neg_()
        dk = tiles.scaled(dk, tiles.key_from_start, out=dk)
        if tiles.geometry.trained:
            tiles.pass_from_start(tiles.k, dk)
        da = tiles.product(dv, memory.v.mT).neg_().tril_(-1)
        dk.add_(found.k)
        _, _, within = self.k_scores.backward(da, tiles.geometry.trained, dk, dk)  # k stands on both sides
        if within is not None:
            tiles.pass_within(within)
        return Gradients(found.q, dk, dv, None, dbeta)
