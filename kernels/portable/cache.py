"""How much of a CPU's caches there is for one block of chunks, as Linux tells it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

CPU = Path("/sys/devices/system/cpu/cpu0/cache")
UNTOLD = 32 << 20
"""Bytes, where no system tells: what servers have for a few cores."""


@cache
def cache_bytes(folder: Path = CPU) -> int:
    """The size of the largest cache of data."""
    sizes = [_size(index) for index in folder.glob("index*")]
    return max(sizes, default=0) or UNTOLD


def _size(index: Path) -> int:
    """Bytes of one cache, 0 if it holds instructions or does not say; "512K" is how the kernel writes it."""
    try:
        kind, size = ((index / name).read_text(encoding="ascii").strip() for name in ("type", "size"))
        return int(size.removesuffix("K")) << 10 if kind != "Instruction" else 0
    except (OSError, ValueError):
        return 0
