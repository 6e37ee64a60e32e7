"""`lasp tune`: measures how this GPU likes the Triton kernels cut into tiles, and keeps the answer on disk.

Every kernel that a training step launches begins with its default tiling. Those that differ from it by one step are
tried: half or twice the channels of keys or of values to a tile, 4 or 8 warps, 2 or 3 stages of a loop in flight. From
the best of them it goes on, until nothing is better: some ten compilations per kernel, seconds each.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch

from lasp.kernels.gpu import tuning
from lasp.kernels.gpu.tuning import Tiling, Work
from lasp.launch.bench.kernels import Shape
from lasp.launch.bench.mixers import MIXERS, Mixer
from lasp.launch.bench.timing import Contestant, occupy_card
from lasp.launch.cli import USER_ERROR, print_error

MARGIN = 0.02
"""The share of a time by which another must be shorter to count as better: medians on a GPU repeat to about 1 %."""

MISFIT = float("inf")
"""The time of a tiling that takes more of a multiprocessor than there is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Tune the kernels of each mixer and dim, and tell what was chosen; 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="lasp tune", description=__doc__)
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=list(MIXERS))
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128], help="of keys and values")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=9, metavar="N", help="repetitions per tiling")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print_error("lasp tune measures on a GPU, and torch sees none here")
        return USER_ERROR
    for name, dim in itertools.product(options.mixers, options.dims):
        shape = Shape(1, options.tokens, options.heads, dim)
        chosen = tune_step(training_step(MIXERS[name], shape), partial(kernel_seconds, repeat=options.repeat))
        file = tuning.save(chosen)
        for work, tiling in chosen.items():
            print(f"{name}: {work}: {tiling}", flush=True)
    print(f"written to {file}")
    return 0


def training_step(mixer: Mixer, shape: Shape) -> Contestant:
    """Forward and backward of one layer on the GPU."""
    inputs = [x.requires_grad_() for x in mixer.inputs(shape, "cuda")]

    def step() -> None:
        output = mixer.ours(*inputs, backend="triton")
        torch.autograd.grad(output, inputs, output.detach())

    return step


def tune_step(step: Contestant, timer: Callable[[Contestant], dict[str, float]]) -> dict[Work, Tiling]:
    """The best tiling of every kernel that a step launches and that multiplies bf16: fp32 would need room for more.

    timer: the seconds of each kernel of a step, by its name.
    """
    tuning.in_use.clear()
    step()
    first = {work: tiling for work, tiling in tuning.in_use.items() if work.short}
    for work, tiling in first.items():

        def seconds(candidate: Tiling, work: Work = work) -> float:
            tuning.in_use[work] = candidate
            return timer(step).get(work.kernel, MISFIT)

        tuning.in_use[work] = climb(tiling, seconds, work.whole_keys)
    return {work: tuning.in_use[work] for work in first}


def climb(first: Tiling, seconds: Callable[[Tiling], float], whole_keys: bool) -> Tiling:
    """From a tiling to better ones, a step at a time, until none is better."""
    best, times = first, {first: seconds(first)}
    while True:
        for candidate in neighbours(best, whole_keys):
            if candidate not in times:
                times[candidate] = seconds(candidate)
        fastest = min(times, key=times.__getitem__)
        if times[fastest] >= (1 - MARGIN) * times[best]:
            return best
        best = fastest


def neighbours(tiling: Tiling, whole_keys: bool) -> Iterator[Tiling]:
    """What differs by one step; a tile has 16 channels at least, the least that a product takes, and 128 at most.

    whole_keys: the tile of keys stays, since it has to hold all channels.
    """
    for name in ("value",) if whole_keys else ("key", "value"):
        for size in (getattr(tiling, name) // 2, getattr(tiling, name) * 2):
            if 16 <= size <= 128:
                yield replace(tiling, **{name: size})
    yield replace(tiling, warps=12 - tiling.warps)
    yield replace(tiling, stages=3 if tiling.stages == 2 else 2)


def kernel_seconds(step: Contestant, repeat: int) -> dict[str, float]:
    """Median seconds of each kernel in a step; nothing where one of them does not fit."""
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        _launches(step)  # compiles them
    except (OutOfResources, PTXASError):
        return {}
    rounds = [_totals(_launches(step)) for _ in range(repeat)]
    return {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}


class _Launch(NamedTuple):
    """A launch as it was seen: seconds by the GPU's own clock."""

    kernel: str
    seconds: float


def _launches(step: Contestant) -> list[_Launch]:
    """What a step launches."""
    from triton.runtime import JITFunction

    launch, seen = JITFunction.run, []

    def run(kernel: Any, *arguments: Any, **options: Any) -> Any:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        compiled = launch(kernel, *arguments, **options)
        end.record()
        seen.append((kernel.__name__, start, end))
        return compiled

    occupy_card()  # so that the CPU is ahead of the GPU when the first kernel begins
    with mock.patch.object(JITFunction, "run", run):
        step()
    torch.cuda.synchronize()
    return [_Launch(name, start.elapsed_time(end) / 1e3) for name, start, end in seen]


def _totals(launches: list[_Launch]) -> dict[str, float]:
    """The seconds of each kernel, all its launches together."""
    totals: dict[str, float] = defaultdict(float)
    for one in launches:
        totals[one.kernel] += one.seconds
    return totals
