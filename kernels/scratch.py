"""Scratch: memory for the tiles of one block of chunks, used again for the next block."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scratch:
    """Hands out uninitialised tensors, the same memory in every round.

    A fresh tensor of megabytes costs a page fault per 4 KB on CPU, ten times what the arithmetic on it costs.
    `rewind()` begins a round: tensors of the round before must not be used any more.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._buffers: list[Tensor] = []
        self._used = 0

    def rewind(self) -> None:
        self._used = 0

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor of this shape; the dtype is the scratch's unless given."""
        dtype, numel = dtype or self._dtype, math.prod(shape)
        if self._used == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=dtype, device=self._device))
        buffer = self._buffers[self._used]
        if buffer.dtype != dtype or buffer.numel() < numel:
            buffer = self._buffers[self._used] = torch.empty(numel, dtype=dtype, device=self._device)
        self._used += 1
        return buffer[:numel].view(shape)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """`a @ b` of batches of matrices [N, R, K] and [N, K, C]."""
        return torch.bmm(a, b, out=self(a.shape[0], a.shape[1], b.shape[2]))
