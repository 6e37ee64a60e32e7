"""Memory of a process on Linux: what it holds, and the most that it held."""

from __future__ import annotations

import threading
from pathlib import Path


def status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def begin_peak() -> int:
    """What the process holds, from where "VmHWM" of its status counts anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status("VmRSS")


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
