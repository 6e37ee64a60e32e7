"""Integers only: the checks of `cu_seqlens`, and tables of chunks that respect run boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from torch import Tensor

from lasp.kernels.arguments import told


def document_bounds(cu_seqlens: Tensor | Sequence[int], length: int | None = None) -> tuple[int, ...]:
    """Check that `cu_seqlens` [N + 1] rises from 0 to `length`, where that is known, and return it as integers.

    Raises ValueError with the offending values. Equal neighbours are allowed: they bound an empty document.
    """
    values = _integers(cu_seqlens)
    if len(values) < 2 or values[0] != 0:
        raise ValueError(f"cu_seqlens must begin with 0 and name at least one document, got {_shorten(values)}")
    falls = [(a, b) for a, b in pairwise(values) if b < a]
    if falls:
        raise ValueError(f"cu_seqlens must never decrease, got {falls[0][0]} followed by {falls[0][1]}")
    if length is not None and values[-1] != length:
        raise ValueError(f"cu_seqlens must end at the whole sequence's length {length}, got {values[-1]}")
    return tuple(values)


def _integers(cu_seqlens: object) -> list[int]:
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.is_meta:
        raise ValueError(f"cu_seqlens must hold numbers, got {told(cu_seqlens)}")
    if isinstance(cu_seqlens, list | tuple | range):
        values: object = list(cu_seqlens)
    else:  # of tensors and NumPy's arrays
        values = getattr(cu_seqlens, "tolist", lambda: None)()
    if not isinstance(values, list) or any(not isinstance(value, int) or isinstance(value, bool) for value in values):
        raise ValueError(f"cu_seqlens must be a 1-D sequence of integers, got {told(cu_seqlens)}")
    return values


def _shorten(values: Sequence[int]) -> str:
    return str(list(values)) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"


@dataclass(frozen=True)
class Block:
    """`chunks` neighbouring chunks of `length` tokens each, worked on together while they stay in cache."""

    start: int  # first token
    chunks: int
    length: int
    slot: int  # the slot of the state that enters the first of the chunks
    run: int

    @property
    def stop(self) -> int:
        return self.start + self.chunks * self.length


@dataclass(frozen=True)
class ChunkTable:
    """How runs of tokens are cut into chunks, and where the states between chunks are kept.

    A run of c chunks owns c + 1 neighbouring slots: `first + i` holds the state that enters its chunk i, `last` the
    state that leaves the run. `runs` lists (first, last) per run, `blocks` covers the tokens in order.
    """

    runs: tuple[tuple[int, int], ...]
    blocks: tuple[Block, ...]
    slots: int


@lru_cache(maxsize=256)
def chunk_table(runs: tuple[tuple[int, int], ...], chunk_size: int, block_chunks: int) -> ChunkTable:
    """Cut `runs` (offset, length) into chunks of at most `chunk_size` tokens, at most `block_chunks` to a block.

    No chunk crosses the boundary of a run, so nothing inside a kernel needs to know about documents.
    """
    slots, blocks = state_slots(runs, chunk_size), []
    for run, ((offset, length), (first, _)) in enumerate(zip(runs, slots, strict=True)):
        whole, rest = length // chunk_size, length % chunk_size
        for i in range(0, whole, block_chunks):
            blocks.append(Block(offset + i * chunk_size, min(block_chunks, whole - i), chunk_size, first + i, run))
        if rest:
            blocks.append(Block(offset + whole * chunk_size, 1, rest, first + whole, run))
    return ChunkTable(slots, tuple(blocks), slots[-1][1] + 1)


def state_slots(runs: tuple[tuple[int, int], ...], chunk_size: int) -> tuple[tuple[int, int], ...]:
    """The slots (first, last) of each run's states: arithmetic alone, for lengths may be unknown when it is traced."""
    slots, slot = [], 0
    for _, length in runs:
        last = slot + -(-length // chunk_size)
        slots.append((slot, last))
        slot = last + 1
    return tuple(slots)
