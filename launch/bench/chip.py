"""What this machine's CPU reaches, for `lasp plan --gpu FILE`: write it with --json FILE.

Everything is measured within steps of the models of `lasp bench plan`, in fp32, a core to a rank, operator by operator
and by the place in the model that calls it: of one rank by itself, and of ranks on all cores that share a sequence.
Seconds are those at one pace of the machine for a rank by itself, and at one for ranks on all cores: the median of all
that were seen meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

import lasp
from lasp.launch.bench.case import SIZES, Case, Training, in_ranks
from lasp.launch.bench.options import at_least
from lasp.launch.bench.pace import Pace
from lasp.launch.bench.plan import CASES, plan_at
from lasp.launch.bench.resident import keep_freed
from lasp.launch.bench.table import markdown
from lasp.launch.bench.timing import Contestant, interleave
from lasp.launch.plan.footprint import named_parts
from lasp.launch.plan.tally import Effort, Tally, Where
from lasp.launch.simulate.machine import Machine

RATES = ("products", "passes")
RANKS = 2
"""How many are at work at a time where they are to be seen together."""
SHORT = 256
"""Tokens of a step of which a good part is what its operations wait for one another."""
LARGE = 16 << 20
"""Numbers of a tensor that no allocator keeps."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which models, and how long what is measured is."""
    names = list(dict.fromkeys(case.model for case in CASES))
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="by their mixers or kinds")
    parser.add_argument("--tokens", type=at_least(64), default=1024)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """A file of `lasp plan --gpu`."""
    kinds = {(case.model, bool(case.pattern)): case for case in reversed(CASES) if case.model in options.models}
    models = [Case(case.model, case.pattern, tokens=options.tokens) for case in kinds.values()]
    shared = [replace(case, ranks=RANKS, tokens=options.tokens // RANKS) for case in models]
    seen = [found for case in models for found in in_ranks(case, _look, options.repeat)]
    alone = _rates(seen)
    (small,) = in_ranks(models[0], _small, options.repeat)
    together = _rates(found for case in shared for found in in_ranks(case, _look, options.repeat))
    for chip in (alone, together):
        chip["fresh"] = chip["pace"] * small["fresh"]
    alone |= {"half": 1 / (alone["pace"] * small["half"] * alone["flops"]), "launch": 0.0}
    without = Machine.read({"chip": alone})
    alone["launch"] = statistics.median(
        _launch(replace(case, tokens=SHORT), without, alone["pace"] * found["short"])
        for case, found in zip(models, seen, strict=True)
    )
    together["launch"] = together["pace"] / alone["pace"] * alone["launch"]
    return {"base": "cpu", "chip": alone, "together": together}


def show(figures: dict[str, Any]) -> None:
    """A line per figure."""
    chip, together = figures["chip"], figures["together"]
    for name, one in (("one rank", chip), (f"each of {RANKS}", together)):
        rates = f"{one['flops'] / 1e9:.1f} Gflop/s of products, {one['bandwidth'] / 1e9:.1f} GB/s"
        print(f"{name}: {rates}, at a pace of {1e3 * one['pace']:.0f} ms")
    print(
        f"products of bf16 at {100 * chip['half']:.1f} % of that, {1e9 * chip['fresh']:.2f} ns a byte of new memory, ",
        end="",
    )
    print(f"{1e6 * chip['launch']:.0f} us from one operation to the next")
    both = [(kind, (own, together["mixers"][kind])) for kind, own in chip["mixers"].items()]
    rows = [
        [kind, *(text for share, back in told for text in (f"{100 * share:.1f}", f"{back:.1f}"))] for kind, told in both
    ]
    headings = ["% of the products' speed", "times as long backward"]
    print(markdown(["mixer", *headings, *(f"{text}, of {RANKS}" for text in headings)], rows))


def _rates(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Figures of a chip, from what ranks have seen: of a mixer the last rank's, which attends to most."""
    own = sorted(found, key=lambda one: one["rank"])
    pace = statistics.median(one["pace"] for one in own)
    flops, bandwidth = (
        statistics.median(work / (s * pace) for work, s in (one[name] for one in own)) for name in RATES
    )
    mixers = {
        kind: (work / (there * pace) / flops, back / there)
        for one in own
        for kind, (work, there, back) in one["mixers"]
    }
    return {"flops": flops, "bandwidth": bandwidth, "matmul": 1.0, "stream": 1.0, "mixers": mixers, "pace": pace}


def _launch(case: Case, on: Machine, seconds: float) -> float:
    """Seconds from one operation to the next: what such a step takes beyond its plan without them."""
    efforts = case.footprints(on).of(case.ranks, case.tokens, -1).effort.values()
    beyond = seconds - plan_at(case, on, on.chip.pace)["seconds"]
    return max(beyond, 0.0) / sum(effort.calls for effort in efforts)


def _look(case: Case, group: lasp.SequenceGroup, repeat: float) -> dict[str, Any]:
    """Operations and time of products, bytes and time of passes over memory outside of mixers, and of each kind of
    mixer the operations of its mathematics, and its time there and back without its products; and the time of a step of
    few tokens. Times are in paces."""
    keep_freed()
    training, pace = Training(case, group), Pace()
    parts, kinds = named_parts(training.model)
    first = _Clock()
    clocks = [_Clock(kinds={*kinds}, softmax=first.softmax) for _ in range(int(repeat))]

    def step(clock: _Clock) -> float:
        with clock, clock.places(parts):
            return training.step(case.tokens)

    _, *looks = (pace.beside(partial(step, clock))[1] for clock in (first, *clocks))
    taken = {
        key: statistics.median(clock.seconds[key] / own for clock, own in zip(clocks, looks, strict=True))
        for key in clocks[0].seconds
    }
    work, mixing = clocks[0].work, clocks[0].mixing
    mixers = [(kind, (mixing[kind], taken[f"{kind} forward"], taken[f"{kind} backward"])) for kind in {*kinds}]
    rates = {name: (work[name], taken[name]) for name in RATES}
    _, *few = (pace.beside(partial(training.step, SHORT)) for _ in (first, *clocks))
    return {
        "rank": group.rank,
        "pace": statistics.median(looks),
        "mixers": mixers,
        "short": statistics.median(whole / now for whole, now in few),
        **rates,
    }


def _small(case: Case, group: lasp.SequenceGroup, repeat: float) -> dict[str, float]:
    """Time of a byte that the system gives anew, and of an operation of products of 16 bits, which Muon makes; in
    paces."""
    keep_freed()
    pace, old = Pace(), torch.zeros(LARGE)
    pace()
    before = pace()
    work: dict[str, Contestant] = {"old": lambda: old.fill_(1), "new": lambda: torch.empty(LARGE).fill_(1)}
    seconds = interleave(work, 2 * int(repeat) + 1)
    matrices = [
        nn.Parameter(torch.randn(rows, SIZES["hidden_size"]))
        for rows in (SIZES["hidden_size"], SIZES["intermediate_size"])
    ]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    optimizer, clock = torch.optim.Muon(matrices), _Clock()
    with clock:
        optimizer.step()
    taken = {
        "fresh": max(seconds["new"] - seconds["old"], 0.0) / old.nbytes,
        "half": clock.seconds["half"] / clock.work["half"],
    }
    own = (before + pace()) / 2
    return {name: value / own for name, value in taken.items()}


@dataclass
class _Clock(Tally):
    """Seconds, and the work that was done in them, by RATES, "half" for products of 16 bits, and the kind and direction
    of each mixer; of softmax attention that of its kernels alone, which grows with the square of the tokens. What makes
    large tensors also waits for their memory, and tells of no rate."""

    kinds: set[str] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    work: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def _timed(self, where: Where, operation: Any, effort: Effort, seconds: float) -> None:
        place, direction = where
        if operation.namespace not in ("aten", "lasp"):  # exchanges, which wait for others
            return
        if effort.flops:
            key, work = "half" if effort.half else "products", effort.flops
        elif place in self.kinds and (place not in self.softmax or "attention" in str(operation)):
            key, work = f"{place} {direction}", 0.0
        else:
            key, work = "passes", effort.bytes
        if not effort.fresh or key not in RATES:
            self.seconds[key] += seconds
            self.work[key] += work
