"""Tiles: a block of chunks, head first, in memory that stays in cache.

A block of [B, T, h, D] becomes N = n·B·H matrices (n chunks, B batches, H states) of C tokens. Heads that are fewer
than the states are repeated; of queries that are more, the G that share a state lie one below the other: R = G·C rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.kernels.chunks import Block, ChunkTable, chunk_table, state_slots
from lasp.kernels.decays import decay_factor, finite
from lasp.kernels.inputs import Gradients, Inputs
from lasp.kernels.portable.cache import cache_bytes
from lasp.kernels.portable.scores import Scores, scores
from lasp.kernels.portable.scratch import Scratch

FEWEST_ROWS, MOST_ROWS = 1024, 8192
"""Tokens x states to a block: fewer cost more in calls than they save in cache misses, more save no calls worth it."""


@dataclass(frozen=True)
class Geometry:
    """What all stages share: runs (offset, length) in chunks of `size` tokens, B batches, H states of [K, V], the scale
    and the compute dtype.

    masked: without a mask there is no attention within chunks, every token reads the same state of its whole document.
    trained: whether the gates have a gradient; those of Lightning and RetNet are constants.
    """

    runs: tuple[tuple[int, int], ...]
    size: int
    batch: int
    heads: int
    key_dim: int
    value_dim: int
    scale: float
    dtype: torch.dtype
    masked: bool
    trained: bool

    @cached_property
    def table(self) -> ChunkTable:
        """The chunks, in blocks."""
        rows = max(FEWEST_ROWS, min(cache_bytes() // self._row_bytes, MOST_ROWS))
        return chunk_table(self.runs, self.size, max(1, rows // (self.size * self.batch * self.heads)))

    @property
    def _row_bytes(self) -> int:
        """What a row of a block takes in backward: of keys and of values six tiles, of states two, of scores three."""
        key, value = self.key_dim, self.value_dim
        numbers = 6 * (key + value) + 2 * key * value // self.size + (3 * self.size if self.masked else 0)
        return numbers * self.dtype.itemsize

    @property
    def slots(self) -> tuple[tuple[int, int], ...]:
        """Of each run's states the first and the last."""
        return state_slots(self.runs, self.size)

    @property
    def count(self) -> int:
        """Of all states."""
        return self.slots[-1][1] + 1

    def new_states(self, slots: int, like: Tensor, columns: int | None = None) -> Tensor:
        """Memory for states [slots, B, H, K, V], or for matrices [slots, B, H, K, columns]."""
        shape = (slots, self.batch, self.heads, self.key_dim, self.value_dim if columns is None else columns)
        return torch.empty(shape, dtype=self.dtype, device=like.device)


class Tiles:
    """The tiles of one block, each read when it is first asked for, and the decays within its chunks.

    A decay is [n or 1, B or 1, H, C, 1 or K]: one for all chunks where it is per head, one per channel only for GLA's.
    """

    def __init__(
        self, inputs: Inputs, block: Block, geometry: Geometry, scratch: Scratch, grad: Tensor | None = None
    ) -> None:
        self.inputs, self._grad = inputs, grad
        self.block, self.geometry, self.scratch = block, geometry, scratch

    @cached_property
    def q(self) -> Tensor:
        """Queries [N, R, K]."""
        return self.read(self.inputs.q)

    @cached_property
    def k(self) -> Tensor:
        """Keys [N, C, K]."""
        return self.read(self.inputs.k)

    @cached_property
    def v(self) -> Tensor:
        """Values [N, C, V]."""
        return self.read(self.inputs.v)

    @cached_property
    def v_columns(self) -> Tensor:
        """Values [N, V, C]: a product with the transpose of short rows takes twice as long as copying them so."""
        view = block_view(self.inputs.v, self.block, self.geometry.heads).mT
        return self.scratch(*view.shape).copy_(view).flatten(0, 3)

    @cached_property
    def grad(self) -> Tensor:
        """Gradients of the output [N, R, V]."""
        assert self._grad is not None, "the backward stages are given the output's gradient"
        return self.read(self._grad)

    @cached_property
    def gates(self) -> Tensor | None:
        """Log-decays of the tokens."""
        log_decay, geometry = self.inputs.log_decay, self.geometry
        if log_decay is None:
            return None
        if log_decay.dim() == 1:
            per_head = finite(log_decay.to(geometry.dtype)).repeat_interleave(geometry.heads // log_decay.shape[0])
            return per_head.view(1, 1, -1, 1, 1).expand(-1, -1, -1, self.block.length, -1)
        view = block_view(log_decay.unsqueeze(-1) if log_decay.dim() == 3 else log_decay, self.block, geometry.heads)
        return finite(view.to(geometry.dtype).flatten(2, 3))

    @cached_property
    def scores(self) -> Scores:
        """The decayed products of queries and keys within the chunks, [N, R, C]."""
        return scores(self.q, self.k, self.gates, self.geometry.scale, self.scratch)

    @cached_property
    def decay_from_start(self) -> Tensor | None:
        """The decay between the chunk's start and each token, its own included."""
        return None if self.gates is None else decay_factor(self.gates.cumsum(-2))

    @cached_property
    def from_start(self) -> Tensor:
        """The same times the scale of the queries; the scale alone [1] without decay."""
        scale = torch.full((1,), self.geometry.scale, dtype=self.geometry.dtype, device=self.inputs.q.device)
        return scale if self.decay_from_start is None else self.decay_from_start * scale

    @cached_property
    def to_end(self) -> Tensor | None:
        """The decay between each token and the chunk's end: summed from behind, for a difference would cancel."""
        if self.gates is None:
            return None
        later = self.gates.flip(-2).cumsum(-2).flip(-2)
        return decay_factor(F.pad(later[..., 1:, :], (0, 0, 0, 1)))

    @cached_property
    def whole(self) -> Tensor | None:
        """The decay over the whole chunk, one row."""
        return None if self.gates is None else decay_factor(self.gates.sum(-2, keepdim=True))

    def passed_from_start(self, rows: Tensor, grad: Tensor, onto: Tensor | None) -> Tensor:
        """Gradients of the gates from those of `rows` [N, R, K] decayed from the chunk's start, added to `onto`.

        A gate is passed by the state that entered the chunk, on its way to the tokens at or after the gate.
        """
        passed = self.by_gate(self.times(rows, grad)).flip(-2).cumsum(-2).flip(-2)
        return passed if onto is None else passed.add_(onto)

    def product(self, a: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
        """`a @ b` of batches of matrices, added to the tile `onto` if that is given."""
        return self.scratch.product(a, b, onto)

    def times(self, a: Tensor, b: Tensor) -> Tensor:
        """`a * b` of equal tiles, to be summed before the next product is made."""
        return torch.mul(a, b, out=self.scratch.temporary(*a.shape))

    def scaled(self, tile: Tensor, factor: Tensor | None, out: Tensor | None = None) -> Tensor:
        """A tile [N, R, D] times a decay, to be used before the next product is made unless it goes to `out`."""
        if factor is None:
            return tile
        out = self.scratch.temporary(*tile.shape) if out is None else out
        if factor.dim() == 1:
            return torch.mul(tile, factor, out=out)
        batch, heads, length = factor.shape[1:4]
        shape = (-1, batch, heads, tile.shape[1] // length, length, tile.shape[2])
        torch.mul(tile.view(shape), factor.unsqueeze(3), out=out.view(shape))
        return out

    def by_gate(self, tile: Tensor) -> Tensor:
        """A tile [N, R, K] summed over what shares one gate, as [n·B, H, C, 1 or K]."""
        assert self.gates is not None, "only where there are gates"
        if self.gates.shape[-1] == 1:
            tile = tile.sum(-1, keepdim=True)
        if tile.shape[1] > self.block.length:
            tile = tile.unflatten(1, (-1, self.block.length)).sum(1)
        return tile.unflatten(0, (-1, self.geometry.heads))

    def held(self, state: Tensor, dstate: Tensor) -> Tensor:
        """States [N, K, V] times gradients of states, summed over what shares one gate, [n·B, H, 1, 1 or K]."""
        assert self.gates is not None, "only where there are gates"
        product = self.times(state, dstate)
        # One long sum is quicker than a sum of sums, and than a product of long vectors.
        product = (
            product.flatten(1).sum(1).view(-1, 1, 1) if self.gates.shape[-1] == 1 else product.sum(-1).unsqueeze(1)
        )
        return product.unflatten(0, (-1, self.geometry.heads))

    def by_chunk(self, tile: Tensor) -> tuple[Tensor, ...]:
        """A tile [N, R, D] chunk by chunk, [B·H, R, D] each."""
        return tile.unflatten(0, (self.block.chunks, -1)).unbind()

    def read(self, x: Tensor) -> Tensor:
        """The block's part of [B, T, h, D] as a tile [N, C or R, D]."""
        view = block_view(x, self.block, self.geometry.heads)
        tile = self.scratch(*view.shape).copy_(view)
        return tile.view(self.block.chunks * self.geometry.batch * self.geometry.heads, -1, x.shape[-1])


def block_view(x: Tensor, block: Block, states: int) -> Tensor:
    """A block of [B, T, h, D] as [n, B, a, b, C, D]: a·b heads, or states when fewer heads than states are given."""
    part = x[:, block.start : block.stop].unflatten(1, (block.chunks, block.length)).permute(1, 0, 3, 2, 4)
    heads = x.shape[2]
    if heads > states:
        return part.unflatten(2, (states, heads // states))
    return part.unsqueeze(3).expand(-1, -1, -1, states // heads, -1, -1)


def put(tile: Tensor, block: Block, total: Tensor) -> None:
    """Put a tile into its block of [B, T, h, D], summed over the states that share one of the h heads."""
    _target(total, block).copy_(_by_head(tile, total, block))


def add(tile: Tensor, block: Block, before: Tensor, total: Tensor) -> None:
    """Put a tile likewise, added to what stands in that block of `before`."""
    torch.add(_target(before, block), _by_head(tile, total, block), out=_target(total, block))


def each(how: Callable[..., None], tiles: Gradients, block: Block, *totals: Gradients) -> None:
    """Put or add each tile that there is into its block of its gradient."""
    for tile, *targets in zip(tiles, *totals, strict=True):
        if tile is not None and targets[0] is not None:
            how(tile, block, *targets)


def _target(total: Tensor, block: Block) -> Tensor:
    return block_view(total, block, total.shape[2])[:, :, :, 0]


def _by_head(tile: Tensor, total: Tensor, block: Block) -> Tensor:
    """A tile as [n, B, h, C, D]."""
    heads = total.shape[2]
    tile = tile.reshape(block.chunks, total.shape[0], -1, block.length, tile.shape[-1])
    return tile if tile.shape[2] == heads else tile.unflatten(2, (heads, -1)).sum(3)
