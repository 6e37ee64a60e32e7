"""Memory of a process on Linux: what it holds, and the most that it held."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h


def status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def begin_peak() -> int:
    """What the process holds, from where "VmHWM" of its status counts anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status("VmRSS")


def give_back_freed() -> None:
    """Freed tensors go back to the system at once, and what this process holds is what is in use."""
    if libc := _thresholds(1 << 16, 1 << 16):
        libc.malloc_trim(0)


def keep_freed() -> None:
    """Freed tensors stay at hand, as in any training after some steps: glibc's thresholds grow until they are these
    (mallopt(3)). What is given back at once is made anew, page by page, which takes longer than to add it up."""
    _thresholds(64 << 20, 32 << 20)


def _thresholds(trim: int, mmap: int) -> ctypes.CDLL | None:
    """glibc, with these set; None where it is another library."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return None
    libc.mallopt(_TRIM, trim)
    libc.mallopt(_MMAP, mmap)
    return libc


class AnonymousPeak(threading.Thread):
    """The most anonymous memory while it ran, looked at every 2 ms: neither files nor memory shared with others."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self._over = threading.Event()

    def __enter__(self) -> AnonymousPeak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(0.002):
            self.bytes = max(self.bytes, status("RssAnon"))
