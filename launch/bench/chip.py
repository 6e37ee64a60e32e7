"""What this machine's CPU reaches, for `lasp plan --gpu FILE`: write it with --json FILE.

Products, passes over memory and mixers are measured within steps of the models of `lasp bench plan`, one rank on one
core in fp32; mixers there and back by the clock, less their projections at the speed of products.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lasp
from lasp.launch.bench.case import SIZES, WARM, Case, Training, in_ranks
from lasp.launch.bench.options import at_least
from lasp.launch.bench.plan import CASES
from lasp.launch.bench.resident import keep_freed
from lasp.launch.bench.table import markdown
from lasp.launch.bench.timing import interleave
from lasp.launch.plan.tally import Effort, effort_of
from lasp.memory.parts import layers_of, mixers_of
from lasp.parallel.work import work


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which models, and how long what is measured is."""
    names = list(dict.fromkeys(case.model for case in CASES))
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="by their mixers or kinds")
    parser.add_argument("--tokens", type=at_least(64), default=1024)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """A file of `lasp plan --gpu`."""
    (chip,) = in_ranks(replace(CASES[0], tokens=options.tokens), _plain, options.repeat)
    mixers: dict[str, tuple[float, float]] = {}
    models = {(case.model, case.pattern): case for case in CASES if case.model in options.models}
    for case in (replace(case, levers="none", ranks=1, optimizer="adamw", engine="ddp") for case in models.values()):
        (found,) = in_ranks(replace(case, tokens=options.tokens), _mixers, options.repeat)
        for kind, (there, back, flops, products) in found.items():
            alone = max(there - products / chip["flops"], 0.05 * there)
            both = max(back - 2 * products / chip["flops"], 0.05 * back)
            mixers[kind] = flops / alone / chip["flops"], both / alone
    return {"base": "cpu", "chip": chip | {"mixers": mixers}}


def show(figures: dict[str, Any]) -> None:
    """A line per figure."""
    chip = figures["chip"]
    print(f"{chip['flops'] / 1e9:.1f} Gflop/s of products, {chip['bandwidth'] / 1e9:.1f} GB/s, ", end="")
    print(f"{100 * chip['half']:.0f} % of them in bf16, ", end="")
    print(f"{1e6 * chip['launch']:.0f} us from one small operation to the next")
    rows = [[kind, f"{100 * share:.1f}", f"{back:.1f}"] for kind, (share, back) in chip["mixers"].items()]
    print(markdown(["mixer", "% of the products' speed", "times as long backward"], rows))


def _plain(case: Case, group: lasp.SequenceGroup, repeat: float) -> dict[str, float]:
    """Products and passes over memory as they come in steps of a model, and operations too small to take time."""
    keep_freed()
    training, clock = Training(case, group), _Within()
    for _ in range(WARM):
        training.step(case.tokens)
    with clock:
        for _ in range(int(repeat)):
            training.step(case.tokens)
    reached = clock.products.flops / clock.multiplying
    small, half = torch.zeros(8), torch.randn(SIZES["hidden_size"], SIZES["hidden_size"], dtype=torch.bfloat16)
    seconds = interleave({"small": lambda: [small.add(1) for _ in range(99)], "half": lambda: half @ half}, 9)
    return {
        "flops": reached, "bandwidth": clock.passes.bytes / clock.passing, "launch": seconds["small"] / 99,
        "matmul": 1.0, "stream": 1.0, "half": 2 * len(half) ** 3 / seconds["half"] / reached,
    }  # fmt: skip


class _Within(TorchDispatchMode):
    """Matrix products, and passes over memory, by what a plan counts as such, and the seconds of both."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.multiplying = Effort(), 0.0
        self.passes, self.passing = Effort(), 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begun = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        seconds, effort = time.perf_counter() - begun, effort_of(func, args, kwargs or {}, result)
        if effort.flops:
            self.products, self.multiplying = self.products + effort, self.multiplying + seconds
        elif func.namespace == "aten":  # mixers are operators of their own, and sums over ranks nothing on one
            self.passes, self.passing = self.passes + effort, self.passing + seconds
        return result


def _mixers(case: Case, group: lasp.SequenceGroup, repeat: float) -> dict[str, tuple[float, ...]]:
    """By kind: seconds there and back, operations of the mathematics, and of products in the open."""
    keep_freed()
    training = Training(case, group)
    clocks = defaultdict[str, list[_Clock]](list)
    for layer in layers_of(training.model):
        for mixer in mixers_of(layer):
            clocks[type(mixer).__name__].append(_Clock(mixer))
    for _ in range(int(repeat) + 1):
        training.step(case.tokens)
    return {
        kind: tuple(map(statistics.median, zip(*(c.told() for c in own), strict=True))) for kind, own in clocks.items()
    }


def _products(counter: FlopCounterMode) -> float:
    """As a plan counts them: convolutions of few taps are passes."""
    counts = counter.get_flop_counts()["Global"]
    return float(sum(flops for packet, flops in counts.items() if "convolution" not in str(packet)))


class _Clock:
    """Around a mixer, forward and backward."""

    def __init__(self, mixer: nn.Module) -> None:
        self.there: list[float] = []
        self.back: list[float] = []
        self.flops = self.products = 0.0
        self._begun = self._turned = 0.0
        mixer.register_forward_pre_hook(self._enter, with_kwargs=True)
        mixer.register_forward_hook(self._leave)

    def told(self) -> tuple[float, float, float, float]:
        """Medians of all but the first."""
        return statistics.median(self.there[1:]), statistics.median(self.back[1:]), self.flops, self.products

    def _enter(self, mixer: nn.Module, args: Any, kwargs: Any) -> None:
        given = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad)
        given.register_hook(self._ended)
        if not self.there:  # counted once, in the pass whose time does not count
            self._counts = ExitStack()
            self._work = self._counts.enter_context(work())
            self._counter = self._counts.enter_context(FlopCounterMode(display=False))
        self._begun = time.perf_counter()

    def _leave(self, mixer: nn.Module, args: Any, output: Any) -> None:
        self.there.append(time.perf_counter() - self._begun)
        if len(self.there) == 1:
            self._counts.close()
            self.flops, self.products = self._work.flops, _products(self._counter)
        (output[0] if isinstance(output, tuple) else output).register_hook(self._turn)

    def _turn(self, gradient: Tensor) -> None:
        self._turned = time.perf_counter()

    def _ended(self, gradient: Tensor) -> None:
        self.back.append(time.perf_counter() - self._turned)
