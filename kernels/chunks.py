"""Integers only: runs of tokens cut into chunks, and where the states between chunks are kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

CHUNK_SIZE = 64
"""Tokens to a chunk, unless the caller says."""
UNMASKED_CHUNK_SIZE = 1024
"""The same without a mask, where a chunk has no inside: long ones only save states."""


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


def ceil_div(size: int, tile: int) -> int:
    """How many tiles of one size it takes to cover another."""
    return -(-size // tile)


def state_slots(runs: tuple[tuple[int, int], ...], chunk_size: int) -> tuple[tuple[int, int], ...]:
    """The slots (first, last) of each run's states: arithmetic alone, for lengths may be unknown when it is traced."""
    slots, slot = [], 0
    for _, length in runs:
        last = slot + ceil_div(length, chunk_size)
        slots.append((slot, last))
        slot = last + 1
    return tuple(slots)
