"""Integers on the device: the chunks of a call, and the segments in which a card carries states at the same time."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.kernels.chunks import ceil_div, chunk_table

# Chunks that a segment has at least: fewer would spend more on joining segments than they save.
LEAST_CHUNKS = 8


class DeviceTable(NamedTuple):
    """chunks [chunks, 3]: first token, length, slot of the state it reads; segments [segments, 2]: first chunk and the
    one behind the last; owner [chunks]: each chunk's segment; runs: first segment of each run and the one behind the
    last. A run has a segment even if it has no tokens."""

    chunks: Tensor
    segments: Tensor
    owner: Tensor
    runs: tuple[tuple[int, int], ...]


@lru_cache(maxsize=64)
def device_table(
    runs: tuple[tuple[int, int], ...], size: int, masked: bool, programs: int, processors: int, device: torch.device
) -> DeviceTable:
    """runs: (offset, length) each, in tokens, cut into chunks of `size`. masked: each chunk reads a state of its own,
    else that of its run. programs: how many a segment is worked on by; processors: how many the card runs at once."""
    table = chunk_table(runs, size, 1)
    chunks = [
        (block.start + i * block.length, block.length, block.run) for block in table.blocks for i in range(block.chunks)
    ]
    counts = [last - first for first, last in table.runs]
    segments: list[tuple[int, int]] = []
    owner: list[int] = []
    segment_runs, chunk = [], 0
    for cuts in segment_counts(counts, programs, processors):
        segment_runs.append((len(segments), len(segments) + len(cuts)))
        for count in cuts:
            owner += [len(segments)] * count
            segments.append((chunk, chunk + count))
            chunk += count
    slots = [(start, length, i if masked else run) for i, (start, length, run) in enumerate(chunks)]
    return DeviceTable(
        torch.tensor(slots, dtype=torch.int32, device=device).view(-1, 3),
        torch.tensor(segments, dtype=torch.int32, device=device).view(-1, 2),
        torch.tensor(owner, dtype=torch.int64, device=device),
        tuple(segment_runs),
    )


def processors(device: torch.device) -> int:
    """How many programs a device runs at once; Triton's interpreter runs one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def segment_counts(chunks: list[int], programs: int, processors: int) -> list[list[int]]:
    """Cut runs of so many chunks into segments of nearly equal length, until every processor has two programs."""
    wanted = ceil_div(2 * processors, programs)
    total = sum(chunks)
    cuts = []
    for count in chunks:
        pieces = max(1, min(count // LEAST_CHUNKS, round(wanted * count / total) if total else 1))
        cuts.append([count // pieces + (i < count % pieces) for i in range(pieces)])
    return cuts
