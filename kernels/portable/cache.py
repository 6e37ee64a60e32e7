"""How much cache a CPU's core has for one block of chunks, as Linux tells it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

CPU = Path("/sys/devices/system/cpu/cpu0/cache")
UNTOLD = 1 << 20
"""Bytes, where no system tells: what cores of servers have."""


@cache
def cache_bytes(folder: Path = CPU) -> int:
    """The size of a core's second-level cache: the largest is shared, with other cores and with other machines."""
    return max((_size(index) for index in folder.glob("index*")), default=0) or UNTOLD


def _size(index: Path) -> int:
    """Bytes of a cache of the second level, 0 if it is another or does not say; "512K" is how the kernel writes it."""
    try:
        level, size = ((index / name).read_text(encoding="ascii").strip() for name in ("level", "size"))
        return int(size.removesuffix("K")) << 10 if level == "2" else 0
    except (OSError, ValueError):
        return 0
