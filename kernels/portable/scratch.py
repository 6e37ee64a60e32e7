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
        self._dtype, self._device = dtype, device
        self._buffers: list[Tensor] = []
        self._temporary = torch.empty(0, dtype=dtype, device=device)
        self._used = 0

    def rewind(self) -> None:
        self._used = 0

    def __call__(self, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape, the caller's until the round ends."""
        if self._used == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=self._dtype, device=self._device))
        self._buffers[self._used] = buffer = _at_least(self._buffers[self._used], math.prod(shape))
        self._used += 1
        return buffer[: math.prod(shape)].view(shape)

    def temporary(self, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape, the caller's until the next one is asked for."""
        self._temporary = _at_least(self._temporary, math.prod(shape))
        return self._temporary[: math.prod(shape)].view(shape)

    def product(self, a: Tensor, b: Tensor, onto: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """`scale·a @ b` of batches of matrices [N, R, K] and [N, K, C], added to `onto` [N, R, C] if that is given."""
        out = self(a.shape[0], a.shape[1], b.shape[2]) if onto is None else onto
        return torch.baddbmm(out, a, b, beta=0 if onto is None else 1, alpha=scale, out=out)


def _at_least(buffer: Tensor, numel: int) -> Tensor:
    return buffer if buffer.numel() >= numel else buffer.new_empty(numel)
