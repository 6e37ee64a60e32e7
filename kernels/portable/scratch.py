"""Scratch: memory for the tiles of one block of chunks, used again for the next block."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor


class Scratch:
    """Hands out uninitialised tensors, the same memory in every round.

    A fresh tensor of megabytes costs a page fault per 4 KB on CPU, which takes longer than the arithmetic on it.
    `rewind()` begins a round: tensors of the round before must not be used any more.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        empty = torch.empty(0, dtype=dtype, device=device)
        self._tiles = defaultdict[int, _Tile](lambda: _Tile(empty))
        self._temporary = _Tile(empty)
        self._used = 0

    def rewind(self) -> None:
        self._used = 0

    def __call__(self, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape, the caller's until the round ends."""
        self._used += 1
        return self._tiles[self._used][shape]

    def copy(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What `x` holds, in a tensor of this shape, likewise."""
        self._used += 1
        tile = self._tiles[self._used]
        tile[x.shape].copy_(x)
        return tile[shape]

    def temporary(self, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape, the caller's until the next one is asked for."""
        return self._temporary[shape]

    def product(self, a: Tensor, b: Tensor, onto: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """`scale·a @ b` of batches of matrices [N, R, K] and [N, K, C], added to `onto` [N, R, C] if that is given."""
        if onto is not None:
            return torch.baddbmm(onto, a, b, alpha=scale, out=onto)
        matrices, rows, _ = a.shape
        out = self(matrices, rows, b.shape[2])
        return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


class _Tile(dict[tuple[int, ...], Tensor]):
    """Memory that grows, seen in a few shapes again and again: a shape seen before costs no call."""

    def __init__(self, memory: Tensor) -> None:
        super().__init__()
        self._memory = memory

    def __missing__(self, shape: tuple[int, ...]) -> Tensor:
        numel = math.prod(shape)
        if self._memory.numel() < numel:
            self._memory = self._memory.new_empty(numel)
            self.clear()
        self[shape] = view = self._memory[:numel].view(shape)
        return view
