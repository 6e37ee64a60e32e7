"""Timing that survives a noisy machine: contestants take turns, and the median counts."""

from __future__ import annotations

import platform
import signal
import statistics
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

Contestant = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


def wall_seconds(run: Contestant) -> float:
    """By the clock."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cpu_seconds(run: Contestant) -> float:
    """What this process's threads took, whatever else the machine did meanwhile."""
    start = time.process_time()
    run()
    return time.process_time() - start


def card_seconds(run: Contestant) -> float:
    """By the GPU's own clock, once it is busy with something else while the CPU launches the run."""
    occupy_card()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def occupy_card(products: int = 4) -> None:
    """Give the GPU some milliseconds of work, which also takes all earlier data out of its cache."""
    square = torch.empty(8192, 8192, dtype=torch.bfloat16, device="cuda")
    for _ in range(products):
        torch.mm(square, square)


class TimeIsUp(BaseException):
    """Not an Exception, which Triton's compiler would make one of its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp in what is done here, in Python on the main thread, once the seconds are over.

    Again each second, for where an exception is not passed on.
    """

    def stop(signum: int, frame: object) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interleave(
    contestants: dict[Name, Contestant],
    repeat: int,
    together: Callable[[], None] = lambda: None,
    warm: bool = True,
    clock: Callable[[Contestant], float] = wall_seconds,
) -> dict[Name, float]:
    """Median seconds of each contestant, all of them once per round.

    together: called before each run, and within its time at its end: ranks begin together, and the slowest counts.
    warm: begin with a round that is not counted.
    """

    def run_together(run: Contestant) -> None:
        run()
        together()

    times: dict[Name, list[float]] = {name: [] for name in contestants}
    for _ in range(repeat + warm):
        for name, run in contestants.items():
            together()
            times[name].append(clock(partial(run_together, run)))
    return {name: statistics.median(measured[warm:]) for name, measured in times.items()}


def machine(threads: int) -> dict[str, Any]:
    """What a figure must be read with."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    chip = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"chip": chip, "threads": threads, "torch": torch.__version__, "python": platform.python_version()}


def compared(speed: float, peer: str) -> str:
    """Words for how many times as fast as a peer something is: "1.25 times slower than the peer" for 0.8."""
    factor = f"{max(speed, 1 / speed):.2f}"
    if factor == "1.00":
        return f"as fast as {peer}"
    return f"{factor} times {'faster' if speed > 1 else 'slower'} than {peer}"
