"""Plans beside what was measured: the memory of a rank and the time of a step, on the ranks of this machine, in fp32.

Every case is planned and trained in turn. A rank's memory is the most that it holds in a step, by the kernel's own
mark, beyond what it held when its libraries were at work; a step is the median of some. `--part longest`: the longest
sequence that is planned into a limit on memory is trained under it (RLIMIT_DATA), and one that is a tenth longer.
`--part choice`: every candidate of a setting is trained, to see how far the one that a plan takes is from the fastest.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from lasp.launch.bench.case import Case, train, trains
from lasp.launch.bench.table import markdown
from lasp.launch.bench.timing import machine
from lasp.launch.plan.candidate import LEVERS, Candidate, Job, candidates
from lasp.launch.plan.estimate import Estimate, estimate
from lasp.launch.plan.footprint import Footprints, Setting
from lasp.launch.plan.report import longest
from lasp.launch.simulate.machine import Machine

CASES = (
    Case("lightning", "L"),
    Case("lightning", "L", "fused loss"),
    Case("lightning", "L", "checkpoints"),
    Case("lightning", "L", "tiles"),
    Case("gla", "L", tokens=1024),
    Case("gla", "L", "checkpoints", tokens=1024),
    Case("gated_deltanet", "LLLN"),
    Case("gated_deltanet", "LLLN", "checkpoints"),
    Case("mamba2", "L", "fused loss"),
    Case("lightning", "N"),
    Case("lightning", "L", "fused loss", optimizer="lion"),
    Case("lightning", "L", "checkpoints", optimizer="muon"),
    Case("lightning", "L", "checkpoints", optimizer="adafactor"),
    Case("qwen3"),
    Case("qwen3_next", levers="fused loss"),
    Case("mamba2", levers="checkpoints"),
    Case("lightning", "L", ranks=2, tokens=1024),
    Case("gated_deltanet", "LLLN", "checkpoints", ranks=2, tokens=1024),
    Case("lightning", "L", "fused loss", ranks=2, engine="fsdp2", tokens=1024),
    Case("qwen3", levers="checkpoints", ranks=2, tokens=1024),
)
LIMITED = (0, 2, 4, 7, 13)  # of the cases, those whose longest sequence is looked for where none are named


@dataclass(frozen=True)
class Contest:
    """A training whose layout and levers are to be chosen. seq: tokens of a sequence, of which a step has one for each
    rank; mb: what a rank may hold."""

    model: str
    pattern: str = ""
    ranks: int = 1
    seq: int = 1024
    mb: float = 8000.0

    @property
    def job(self) -> Job:
        return Job(self.seq, self.seq * self.ranks, 1, self.ranks)

    def case(self, candidate: Candidate) -> Case:
        """The training that a candidate stands for."""
        tokens, batches = self.seq // candidate.sp, candidate.repeat(self.job)
        return Case(
            self.model, self.pattern, candidate.levers, candidate.sp, tokens=tokens, dp=candidate.dp, batches=batches
        )


CONTESTS = (
    Contest("lightning", "L"),
    Contest("lightning", "L", mb=200),
    Contest("lightning", "N"),
    Contest("gated_deltanet", "LLLN", mb=250),
    Contest("qwen3", mb=200),
    Contest("lightning", "L", ranks=2),
    Contest("lightning", "N", ranks=2),
    Contest("gla", "L", ranks=2, mb=250),
    Contest("gated_deltanet", "LLLN", ranks=2),
    Contest("qwen3", ranks=2, mb=200),
)
WORSE = 0.05
"""Than the fastest, what a plan's choice may be to count as right."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which cases, and what of them."""
    parser.add_argument("--part", choices=["cells", "longest", "choice"], nargs="+", default=["cells"])
    parser.add_argument(
        "--cases", type=int, choices=range(len(CASES)), nargs="+", metavar="N", help="by number, from 0"
    )
    parser.add_argument("--mb", type=float, default=300.0, help="limit of --part longest, of each rank")
    parser.add_argument("--contests", type=int, choices=range(len(CONTESTS)), nargs="+", metavar="N", help="of choices")
    parser.add_argument("--gpu", default="cpu", help="what `lasp plan --gpu` takes, for the times")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Planned and measured, case by case; the lengths that trained under a limit, and those that did not."""
    on = Machine.named(options.gpu)
    found: dict[str, Any] = {"machine": machine(1), "mb": options.mb, "cells": [], "longest": [], "choices": []}
    for case in (CASES[number] for number in options.cases or range(len(CASES)) if "cells" in options.part):
        planned, measured = _plan(case, on), train(case, options.repeat)
        found["cells"].append(asdict(case) | {"planned": planned, "measured": measured})
        _tell(f"{case}: {planned['bytes'] / 1e6:.0f} MB planned, {measured['bytes'] / 1e6:.0f} measured")
    for case in (CASES[number] for number in options.cases or LIMITED if "longest" in options.part):
        limited = replace(on, chip=replace(on.chip, memory=1e6 * options.mb))
        tokens = longest(_candidate(case), limited, _footprints(case, on)) // case.ranks
        tries = (tokens, ceil(1.1 * tokens))
        trained = [trains(replace(case, tokens=number), 1e6 * options.mb) for number in tries]
        found["longest"].append(asdict(case) | {"tokens": tries, "trained": trained})
        _tell(f"{case}: {tries} tokens train: {trained}")
    numbers = options.contests or range(len(CONTESTS))
    for contest in (CONTESTS[number] for number in numbers if "choice" in options.part):
        found["choices"].append(asdict(contest) | {"candidates": _contest(contest, on, options.repeat)})
        _tell(f"{contest}: {choice(found['choices'][-1])}")
    return found


def _tell(line: str) -> None:
    """What has been measured so far: all of it takes minutes."""
    print(line, file=sys.stderr, flush=True)


def show(figures: dict[str, Any]) -> None:
    """A line per case, with signed errors."""
    rows = []
    for cell in figures["cells"]:
        one, two = cell["planned"], cell["measured"]
        off = [100 * (one[key] / two[key] - 1) for key in ("bytes", "seconds")]
        sizes = (f"{each['bytes'] / 1e6:.0f}" for each in (one, two))
        times = (f"{1e3 * each['seconds']:.0f}" for each in (one, two))
        rows.append([*_named(cell), cell["tokens"], *sizes, f"{off[0]:+.1f}", *times, f"{off[1]:+.0f}"])
    told = ["model", "levers", "ranks", "engine, optimizer", "tokens of a rank"]
    if rows:
        print(markdown([*told, "MB planned", "measured", "off, %", "ms planned", "measured", "off, %"], rows))
        for what, column, most in (("memory", 7, 5), ("time", 10, 15)):
            near = sum(abs(float(row[column])) <= most for row in rows)
            print(f"\n{what} within {most} % in {near} of {len(rows)}")
    if figures["longest"]:
        rows = [[*_named(c), c["tokens"][0], *("trains" if t else "does not" for t in c["trained"])]
                for c in figures["longest"]]  # fmt: skip
        print(f"\nlongest sequence in {figures['mb']:.0f} MB beyond what the libraries hold")
        print(markdown([*told, "it", "a tenth more"], rows))
    if figures["choices"]:
        _show_choices(figures["choices"])
    made = figures["machine"]
    print(f"\n{made['chip']}, torch {made['torch']}, gloo")


def _show_choices(contests: list[dict[str, Any]]) -> None:
    headings = ["model", "ranks", "tokens", "MB", "chosen", "ms", "fastest", "ms", "slower by, %"]
    rows, near = [], 0
    for contest in contests:
        chosen, fastest = choice(contest)
        if chosen is None or fastest is None:
            continue
        worse = chosen["seconds"] / fastest["seconds"] - 1
        near += worse <= WORSE and chosen["bytes"] <= 1e6 * contest["mb"]
        told = [part for one in (chosen, fastest) for part in (one["candidate"], f"{1e3 * one['seconds']:.0f}")]
        model = f"{contest['model']} {contest['pattern']}".strip()
        rows.append([model, contest["ranks"], contest["seq"], f"{contest['mb']:.0f}", *told, f"{100 * worse:.0f}"])
    print(f"\n{markdown(headings, rows)}")
    print(f"\nthe choice fits and is within {100 * WORSE:.0f} % of the fastest in {near} of {len(contests)}")


def choice(contest: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What a plan takes, and the fastest of those that were measured to fit; None where nothing does."""
    tried = contest["candidates"]
    fit = [one for one in tried if one["bytes"] <= 1e6 * contest["mb"]]
    return next(iter(tried), None), min(fit, key=lambda one: one["seconds"], default=None)


def _named(cell: dict[str, Any]) -> list[Any]:
    model = f"{cell['model']} {cell['pattern']}" if cell["pattern"] else f"wrapped {cell['model']}"
    return [model, cell["levers"], cell["ranks"], f"{cell['engine']}, {cell['optimizer']}"]


# Planned ------------------------------------------------------------------------------------------------------------


def _candidate(case: Case) -> Candidate:
    return Candidate(1, case.ranks, "contiguous", "gather", "ring", case.engine, case.levers)


def _footprints(case: Case, on: Machine) -> Footprints:
    return Footprints(
        Setting(case.plan, LEVERS[case.levers], "contiguous", "gather", "ring", "float32", on.wires, case.optimizer)
    )


def _plan(case: Case, on: Machine) -> dict[str, Any]:
    whole = case.tokens * case.ranks
    told = estimate(_candidate(case), Job(whole, whole, 1, case.ranks), on, _footprints(case, on))
    return {"bytes": told.bytes, "seconds": told.seconds, "memory": told.memory, "items": told.items}


def _contest(contest: Contest, on: Machine, repeat: int) -> list[dict[str, Any]]:
    """What the candidates that are planned to fit hold and take, in the order of their plans."""
    limited = replace(on, chip=replace(on.chip, memory=1e6 * contest.mb))
    made = candidates(contest.job, "contiguous", ["gather"], ["ring"], ["ddp"], list(LEVERS))
    planned = [estimate(one, contest.job, limited, _footprints(contest.case(one), on)) for one in made]
    found: list[Estimate] = sorted((one for one in planned if one.fits), key=lambda one: one.seconds)
    return [
        {"candidate": str(one.candidate), "planned": one.seconds, **train(contest.case(one.candidate), repeat)}
        for one in found
    ]
