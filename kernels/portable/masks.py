"""Masks: the decays between the tokens of a chunk whose channels decay alike, for one block of a stretch at a time.

    L_ij = exp(sum_{j < m <= i} log_decay_m)    for i >= j, else 0

In a piece of a few tokens each is the exponential of its own sum. Beyond it by halves, as in `DyadicScores`: of 2h
tokens the later half sees the earlier half over the border between them, and the square of what lies there is an outer
product of two decays, from the key to the border and from the border to the query. All are sums of numbers that are not
positive: none is a difference, which would cancel, and C^2 decays take C·log2(C) exponentials.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.kernels.decays import decay_factor, least_factor

TOGETHER = 64
"""Matrices that are made at once where the number of blocks allows it: outer products of few are short work."""

PIECE = 8
"""Tokens whose decays are made pair by pair: of fewer halves the outer products are rows of one to four numbers."""

_ROWS = 1 << 12


class DecayMasks:
    """Of M matrices [M, C, C] at a time, in the same memory. log_decay: of all blocks [blocks·M, C]."""

    def __init__(self, log_decay: Tensor, matrices: int) -> None:
        length = log_decay.shape[1]
        self._together = math.gcd(len(log_decay) // matrices, max(1, TOGETHER // matrices))  # blocks
        made = self._together * matrices
        padded = 1 << (length - 1).bit_length()
        piece = min(PIECE, padded)
        halves = [piece << i for i in range((padded // piece).bit_length() - 1)]  # from a piece to half the chunk
        memory = log_decay.new_zeros(made, padded, padded)
        self._memory, self._masks = memory, memory[:, :length, :length].split(matrices)
        own = _decays(F.pad(log_decay, (0, padded - length)).reshape(-1, piece), _within(piece, memory.device))
        self._pieces = own.view(-1, padded // piece, piece, piece).tril_().split(made)
        self._diagonal = _along_diagonal(memory, piece, padded // piece)
        sides = _decays(log_decay, _reach(length, tuple(halves), memory.device))
        sides = sides.view(len(log_decay), len(halves), 2, padded // 2)
        self._squares = [squares(memory, half) for half in halves]
        self._sides = [_sides(side, half, made) for side, half in zip(sides.unbind(1), halves, strict=True)]
        self._made: int | None = None

    def __call__(self, index: int) -> Tensor:
        """Those of a block, until another's are asked for; index: which of the blocks it is, in order of time."""
        which, own = divmod(index, self._together)
        if which != self._made:
            self._diagonal.copy_(self._pieces[which])
            for square, (keys, queries) in zip(self._squares, self._sides, strict=True):
                torch.mul(queries[which], keys[which], out=square)
            torch.threshold_(self._memory, least_factor(self._memory.dtype), 0.0)
            self._made = which
        return self._masks[own]


def squares(x: Tensor, half: int) -> Tensor:
    """Where later halves meet earlier halves: [..., C, C] as a view [..., C / (2·half), half, half]."""
    return _along_diagonal(x[..., half:, :], half, x.shape[-1] // (2 * half))


def _along_diagonal(x: Tensor, size: int, count: int) -> Tensor:
    """So many squares of this size, evenly along the diagonal: [..., R, C] as a view [..., count, size, size]."""
    *outer, rows, columns = x.stride()
    stride = (*outer, x.shape[-1] // count * (rows + columns), rows, columns)
    return x.as_strided((*x.shape[:-2], count, size, size), stride, x.storage_offset())


def _decays(log_decay: Tensor, reach: Tensor) -> Tensor:
    """The decays over what is within reach, [rows, pairs], of rows [rows, tokens]."""
    # In fp64, which no setting for fp32 products makes bf16; so many rows at once, for a rank's are many.
    sums = [(rows.double() @ reach).to(log_decay.dtype) for rows in log_decay.split(_ROWS)]
    return decay_factor(torch.cat(sums))


@lru_cache(maxsize=64)
def _within(piece: int, device: torch.device) -> Tensor:
    """Which tokens of a piece lie behind a key and up to a query, [piece, queries·keys]."""
    token = torch.arange(piece, device=device)
    query, key = torch.meshgrid(token, token, indexing="ij")
    return _between(key + 1, query, piece)


@lru_cache(maxsize=64)
def _reach(length: int, halves: tuple[int, ...], device: torch.device) -> Tensor:
    """Which tokens lie between key and border, and between border and query: [C, halves·2·C / 2], by half, by side, and
    by key or query."""
    half = torch.tensor(halves, dtype=torch.int64, device=device).view(-1, 1)
    place = torch.arange(halves[-1] if halves else 0, device=device)
    start, own = place // half * 2 * half, place % half  # of the piece, and within its half
    border = start + half
    first = torch.stack([start + own + 1, border], 1)
    last = torch.stack([border - 1, border + own], 1)
    return _between(first, last, length)


def _between(first: Tensor, last: Tensor, tokens: int) -> Tensor:
    """Ones where a token lies from `first` to `last`, else zeros, [tokens, pairs]."""
    token = torch.arange(tokens, device=first.device).view(-1, 1)
    return ((token >= first.flatten()) & (token <= last.flatten())).double()


def _sides(decays: Tensor, half: int, matrices: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Decays [blocks·M, 2, C / 2] of one half as rows of keys and columns of queries, of so many matrices each."""
    keys, queries = decays.unflatten(-1, (-1, half)).unbind(1)
    return keys.unsqueeze(-2).split(matrices), queries.unsqueeze(-1).split(matrices)
