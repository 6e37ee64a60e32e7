"""Masks: the decays between the tokens of a chunk whose channels decay alike, for one block of a stretch at a time.

    L_ij = exp(sum_{j < m <= i} log_decay_m)    for i >= j, else 0

By halves, as in `DyadicScores`: in a piece of 2h tokens the later half sees the earlier half over the border between
them, and the square of what lies there is an outer product of two decays, from the key to the border and from the
border to the query. Both are sums of numbers that are not positive: none is a difference, which would cancel, and C^2
decays take C·log2(C) exponentials.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from lasp.kernels.decays import decay_factor, least_factor

TOGETHER = 64
"""Matrices that are made at once where the number of blocks allows it: outer products of few are short work."""

_PIECE = 1 << 12


class DecayMasks:
    """Of M matrices [M, C, C] at a time, in the same memory. log_decay: of all blocks [blocks·M, C]."""

    def __init__(self, log_decay: Tensor, matrices: int) -> None:
        length = log_decay.shape[1]
        self._together = math.gcd(len(log_decay) // matrices, max(1, TOGETHER // matrices))  # blocks
        made = self._together * matrices
        padded = 1 << (length - 1).bit_length()
        halves = [1 << i for i in range(padded.bit_length() - 1)]  # from one token to half the chunk
        memory = torch.eye(padded, dtype=log_decay.dtype, device=log_decay.device).repeat(made, 1, 1)
        reach = _reach(length, len(halves), log_decay.device)
        # In fp64, which no setting for fp32 products makes bf16; piece by piece, for a rank's sums are many.
        sums = [(piece.double() @ reach).to(log_decay.dtype) for piece in log_decay.split(_PIECE)]
        sides = decay_factor(torch.cat(sums)).view(len(log_decay), len(halves), 2, padded // 2)
        self._memory, self._masks = memory, memory[:, :length, :length].split(matrices)
        self._squares = [squares(memory, half) for half in halves]
        self._sides = [_sides(side, half, made) for side, half in zip(sides.unbind(1), halves, strict=True)]
        self._made: int | None = None

    def __call__(self, index: int) -> Tensor:
        """Those of a block, until another's are asked for; index: which of the blocks it is, in order of time."""
        which, own = divmod(index, self._together)
        if which != self._made:
            for square, (keys, queries) in zip(self._squares, self._sides, strict=True):
                torch.mul(queries[which], keys[which], out=square)
            torch.threshold_(self._memory, least_factor(self._memory.dtype), 0.0)
            self._made = which
        return self._masks[own]


def squares(x: Tensor, half: int) -> Tensor:
    """Where later halves meet earlier halves: [..., C, C] as a view [..., C / (2·half), half, half]."""
    *outer, rows, columns = x.stride()
    size = (*x.shape[:-2], x.shape[-1] // (2 * half), half, half)
    return x.as_strided(size, (*outer, 2 * half * (rows + columns), rows, columns), x.storage_offset() + half * rows)


@lru_cache(maxsize=64)
def _reach(length: int, halves: int, device: torch.device) -> Tensor:
    """Which tokens lie between key and border, and between border and query: ones and zeros [C, halves·2·C / 2], by
    half, by side, and by key or query."""
    half = 2 ** torch.arange(halves, device=device).view(-1, 1)
    place = torch.arange(1 << halves >> 1, device=device)
    start, own = place // half * 2 * half, place % half  # of the piece, and within its half
    border = start + half
    first = torch.stack([start + own + 1, border], 1)
    last = torch.stack([border - 1, border + own], 1)
    token = torch.arange(length, device=device).view(-1, 1)
    return ((token >= first.flatten()) & (token <= last.flatten())).double()


def _sides(decays: Tensor, half: int, matrices: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Decays [blocks·M, 2, C / 2] of one half as rows of keys and columns of queries, of so many matrices each."""
    keys, queries = decays.unflatten(-1, (-1, half)).unbind(1)
    return keys.unsqueeze(-2).split(matrices), queries.unsqueeze(-1).split(matrices)
