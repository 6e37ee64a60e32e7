"""Tiles: a block of chunks, head first, in memory that stays in cache.

A block of [B, T, h, D] becomes N = n·B·H matrices (n chunks, B batches, H states) of C tokens. Heads that are fewer
than the states are repeated; of queries that are more, the G that share a state lie one below the other: R = G·C rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lasp.kernels.chunks import Block, ChunkTable, chunk_table, state_slots
from lasp.kernels.inputs import Gradients, Inputs
from lasp.kernels.portable.cache import cache_bytes
from lasp.kernels.portable.scores import DyadicScores, MaskedScores, Scores, causal_mask
from lasp.kernels.portable.scratch import Scratch
from lasp.kernels.portable.stretch import Stretch, as_view

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
        """The chunks, in blocks whose keys and values fill the caches of the cores at work: what one operator leaves
        there the next one finds."""
        row = (self.key_dim + self.value_dim) * self.dtype.itemsize
        rows = max(FEWEST_ROWS, min(torch.get_num_threads() * cache_bytes() // row, MOST_ROWS))
        return chunk_table(self.runs, self.size, max(1, rows // (self.size * self.batch * self.heads)))

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
    """The tiles of one block, each read when it is first asked for, and the decays of their rows, None for no decay.

    stretch: that the block is a part of; product: that of the scratch.
    """

    def __init__(
        self,
        inputs: Inputs,
        block: Block,
        geometry: Geometry,
        scratch: Scratch,
        stretch: Stretch,
        grad: Tensor | None = None,
    ) -> None:
        self.inputs, self._grad = inputs, grad
        self.block, self.geometry, self.scratch = block, geometry, scratch
        self._stretch, self._index, self.gates = stretch, stretch.index(block), stretch.gates
        self.product = scratch.product

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
    def grad(self) -> Tensor:
        """Gradients of the output [N, R, V]."""
        assert self._grad is not None, "the backward stages are given the output's gradient"
        return self.read(self._grad)

    @cached_property
    def scores(self) -> Scores:
        """The decayed products of queries and keys within the chunks, [N, R, C]."""
        return self.scores_of(self.q, self.geometry.scale)

    def scores_of(self, q: Tensor, scale: float) -> Scores:
        """Those of other rows with the keys. One factor per token is a mask; one per channel needs the dyadic form."""
        if self.gates is None or not self.gates.per_channel:
            earlier = None if self.gates is None else self.gates.earlier
            return MaskedScores(q, self.k, self.mask, scale, self.scratch, earlier)
        return DyadicScores(q, self.k, self.gates.log_decay[self._index], scale)

    @cached_property
    def mask(self) -> Tensor:
        """Between the tokens of a chunk, where the channels decay alike [M, C, C], M = N, H or 1; until another block's
        is asked for."""
        if self.gates is None:
            return causal_mask(self.k)
        return self.gates.mask(self._index)

    @cached_property
    def from_start(self) -> Tensor:
        """The decay between the chunk's start and each query times the scale, [N, R, 1 or K]; the scale alone [1]
        without decay."""
        if self.gates is None:
            return torch.full((1,), self.geometry.scale, dtype=self.geometry.dtype, device=self.inputs.q.device)
        factor = self.gates.to_query[self._index]
        sharing = self.q.shape[1] // self.block.length
        return factor if sharing == 1 else factor.repeat(1, sharing, 1)

    @cached_property
    def key_from_start(self) -> Tensor | None:
        """The decay between the chunk's start and each key, its own included, [N, C, 1 or K]."""
        return None if self.gates is None else self.gates.from_start[self._index]

    @cached_property
    def to_end(self) -> Tensor | None:
        """The decay between each key and the chunk's end, [N, C, 1 or K]."""
        return None if self.gates is None else self.gates.to_end[self._index]

    @property
    def whole(self) -> Tensor | None:
        """The decay over the whole chunk, [n or 1, B or 1, H, 1, 1 or K]."""
        return None if self.gates is None else self.gates.whole[self._index]

    def pass_from_start(self, rows: Tensor, grad: Tensor) -> None:
        """Let the gates know what `rows` [N, R, K], of this gradient, read of the state that entered the chunk."""
        self._stretch.passing.from_start[self._index].add_(self._by_gate(self.times(rows, grad)))

    def pass_to_end(self, keys: Tensor, grad: Tensor) -> None:
        """And what of `keys` [N, C, K] is carried to the chunk's end."""
        self._stretch.passing.to_end[self._index].add_(self._by_gate(self.times(keys, grad)))

    def pass_across(self, state: Tensor, dstate: Tensor) -> None:
        """And what of the states that enter the chunks [N, K, V] reaches their ends, where its gradient is `dstate`."""
        product = self.times(state, dstate)
        # One long sum is quicker than a sum of sums, and than a product of long vectors.
        held = product.sum(-1).unsqueeze(1) if self._per_channel else product.sum((1, 2), keepdim=True)
        self._stretch.passing.across[self._index].add_(held)

    def pass_within(self, passed: Tensor) -> None:
        """And what pairs of tokens of the chunk send over each gate [N, C, 1 or K]."""
        self._stretch.passing.within[self._index].add_(passed)

    def times(self, a: Tensor, b: Tensor) -> Tensor:
        """`a * b` of equal tiles, to be summed before the next product is made."""
        return torch.mul(a, b, out=self.scratch.temporary(*a.shape))

    def scaled(self, tile: Tensor, factor: Tensor | None, out: Tensor | None = None) -> Tensor:
        """A tile [N, R, D] times a decay, to be used before the next product is made unless it goes to `out`."""
        if factor is None:
            return tile
        return torch.mul(tile, factor, out=self.scratch.temporary(*tile.shape) if out is None else out)

    def by_chunk(self, tile: Tensor) -> tuple[Tensor, ...]:
        """A tile [N, R, D] chunk by chunk, [B·H, R, D] each."""
        return tile.unflatten(0, (self.block.chunks, -1)).unbind()

    def read(self, x: Tensor) -> Tensor:
        """The block's part of [B, T, h, D] or [B, T, h] as a tile [N, C or R, D or 1]."""
        view, heads = self._view(x, self.geometry.heads), self.geometry.heads
        rows = self.block.length * max(1, x.shape[2] // heads)
        return self.scratch.copy(view, (self.block.chunks * self.geometry.batch * heads, rows, view.shape[-1]))

    def put(self, tile: Tensor, total: Tensor) -> None:
        """Put a tile into its block of [B, T, h, D], summed over the states that share one of the h heads."""
        target = self._view(total, total.shape[2])
        target.copy_(as_view(tile, target))

    def add(self, tile: Tensor, before: Tensor, total: Tensor) -> None:
        """Put a tile likewise, added to what stands in that block of `before`."""
        target = self._view(total, total.shape[2])
        torch.add(self._view(before, total.shape[2]), as_view(tile, target), out=target)

    def _view(self, x: Tensor, states: int) -> Tensor:
        return self._stretch.views(x, states)[self._index]

    @property
    def _per_channel(self) -> bool:
        return self.gates is not None and self.gates.per_channel

    def _by_gate(self, tile: Tensor) -> Tensor:
        """A tile [N, R, K] summed over what shares one gate, [N, C, 1 or K]."""
        if not self._per_channel:
            tile = tile.sum(-1, keepdim=True)
        return tile if tile.shape[1] == self.block.length else tile.unflatten(1, (-1, self.block.length)).sum(1)


def each(how: Callable[..., None], tiles: Gradients, *totals: Gradients) -> None:
    """Put or add each tile that there is to its gradient."""
    for tile, *targets in zip(tiles, *totals, strict=True):
        if tile is not None and targets[0] is not None:
            how(tile, *targets)
