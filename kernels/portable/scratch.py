"""Scratch: memory for the tiles of one block of chunks, used again for the next block."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scratch:
    """Hands out uninitialised tensors, the same memory in every round.

    A fresh tensor of megabytes costs a page fault per 4 KB on CPU, which takes longer than the arithmetic on it.
    `rewind()` begins a round: tensors of the round before must not be used any more.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._empty = torch.empty(0, dtype=dtype, device=device)
        self._tiles: list[_Tile] = []
        self._temporary = _Tile(self._empty)
        self._used = 0

    def rewind(self) -> None:
        self._used = 0

    def __call__(self, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape, the caller's until the round ends."""
        return self._next().shaped(shape)

    def copy(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What `x` holds, in a tensor of this shape, likewise."""
        tile = self._next()
        tile.shaped(x.shape).copy_(x)
        return tile.shaped(shape)

    def temporary(self, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape, the caller's until the next one is asked for."""
        return self._temporary.shaped(shape)

    def product(self, a: Tensor, b: Tensor, onto: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """`scale·a @ b` of batches of matrices [N, R, K] and [N, K, C], added to `onto` [N, R, C] if that is given."""
        out = self(a.shape[0], a.shape[1], b.shape[2]) if onto is None else onto
        return torch.baddbmm(out, a, b, beta=0 if onto is None else 1, alpha=scale, out=out)

    def _next(self) -> _Tile:
        if self._used == len(self._tiles):
            self._tiles.append(_Tile(self._empty))
        self._used += 1
        return self._tiles[self._used - 1]


class _Tile:
    """Memory that grows, seen in a few shapes again and again: a shape seen before costs no call."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._seen: dict[tuple[int, ...], Tensor] = {}

    def shaped(self, shape: tuple[int, ...]) -> Tensor:
        if shape not in self._seen:
            numel = math.prod(shape)
            if self._memory.numel() < numel:
                self._memory = self._memory.new_empty(numel)
                self._seen = {}
            self._seen[shape] = self._memory[:numel].view(shape)
        return self._seen[shape]
