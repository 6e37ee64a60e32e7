"""Timing that survives a noisy machine: contestants take turns, and the median counts."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Contestant = Callable[[], None]


def interleave(
    contestants: dict[str, Contestant],
    repeat: int,
    together: Callable[[], None] = lambda: None,
    warm: bool = True,
) -> dict[str, float]:
    """Median seconds of each contestant, all of them once per round.

    together: called before each run, and within its time at its end: ranks begin together, and the slowest counts.
    warm: begin with a round that is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeat + warm):
        for name, run in contestants.items():
            together()
            start = time.perf_counter()
            run()
            together()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(measured[warm:]) for name, measured in times.items()}


def machine(threads: int) -> dict[str, Any]:
    """What a figure must be read with."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    chip = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"chip": chip, "threads": threads, "torch": torch.__version__, "python": platform.python_version()}
