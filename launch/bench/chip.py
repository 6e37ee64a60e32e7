"""What this machine's CPU reaches, for `lasp plan --gpu FILE`: write it with --json FILE.

Products and passes over memory are measured as such; mixers within each model of `lasp bench plan`, there
and back by the clock, one rank on one core in fp32. Their projections are taken off at the speed of products.
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
from torch.utils.flop_counter import FlopCounterMode

import lasp
from lasp.launch.bench.case import SIZES, Case, Training, in_ranks
from lasp.launch.bench.options import at_least
from lasp.launch.bench.plan import CASES
from lasp.launch.bench.resident import keep_freed
from lasp.launch.bench.table import markdown
from lasp.launch.bench.timing import interleave
from lasp.memory.parts import layers_of, mixers_of
from lasp.parallel.work import work


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which models, and how long what is measured is."""
    names = list(dict.fromkeys(case.model for case in CASES))
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="by their mixers or kinds")
    parser.add_argument("--tokens", type=at_least(64), default=1024)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """A file of `lasp plan --gpu`."""
    torch.set_num_threads(1)
    keep_freed()
    chip = _plain(options.tokens, options.repeat)
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
    print(f"{1e6 * chip['launch']:.0f} us from one small operation to the next")
    rows = [[kind, f"{100 * share:.1f}", f"{back:.1f}"] for kind, (share, back) in chip["mixers"].items()]
    print(markdown(["mixer", "% of the products' speed", "times as long backward"], rows))


def _plain(tokens: int, repeat: int) -> dict[str, float]:
    """Products and sums of a layer's size, and operations that are too small to take time."""
    a, b = torch.randn(tokens, SIZES["hidden_size"]), torch.randn(SIZES["hidden_size"], SIZES["intermediate_size"])
    x, y, small = a @ b, torch.randn(tokens, b.shape[1]), torch.zeros(8)
    contestants = {
        "product": lambda: a @ b,
        "sum": lambda: x + y,
        "small": lambda: [small.add(1) for _ in range(99)],
    }
    seconds = interleave(contestants, max(repeat, 99))  # half a second in all
    flops, passed = 2 * a.numel() * b.shape[1], 3 * x.nbytes
    return {"flops": flops / seconds["product"], "bandwidth": passed / seconds["sum"], "launch": seconds["small"] / 99,
            "matmul": 1.0, "stream": 1.0}  # fmt: skip


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
            self.flops, self.products = self._work.flops, float(self._counter.get_total_flops())
        (output[0] if isinstance(output, tuple) else output).register_hook(self._turn)

    def _turn(self, gradient: Tensor) -> None:
        self._turned = time.perf_counter()

    def _ended(self, gradient: Tensor) -> None:
        self.back.append(time.perf_counter() - self._turned)
