"""Plans beside what was measured: the memory of a rank and the time of a step, on the ranks of this machine, in fp32.

Every case is planned and trained in turn. A rank's memory is the most that it holds in a step, by the kernel's own
mark, beyond what it held when its libraries were at work. A step is the median of some, and its plan is brought to the
pace of the machine meanwhile, where `--gpu` names a file that tells at which pace it was made. `--part longest`: the
longest sequence that is planned into a limit on memory is trained under it (RLIMIT_DATA), and one that is a tenth
longer. `--part choice`: every candidate of a setting is trained, to see how far the one that a plan takes is from the
fastest.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from math import ceil
from typing import Any

from lasp.launch.bench import contest
from lasp.launch.bench.case import LAYOUT, METHOD, SCAN, Case, train, trains
from lasp.launch.bench.table import markdown
from lasp.launch.bench.timing import machine
from lasp.launch.plan.candidate import Candidate, Job
from lasp.launch.plan.estimate import estimate
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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which cases, and what of them."""
    parser.add_argument("--part", choices=["cells", "longest", "choice"], nargs="+", default=["cells"])
    parser.add_argument(
        "--cases", type=int, choices=range(len(CASES)), nargs="+", metavar="N", help="by number, from 0"
    )
    parser.add_argument("--mb", type=float, default=300.0, help="limit of --part longest, of each rank")
    parser.add_argument(
        "--contests", type=int, choices=range(len(contest.CONTESTS)), nargs="+", metavar="N", help="of choices"
    )
    parser.add_argument("--gpu", default="cpu", help="what `lasp plan --gpu` takes, for the times")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Planned and measured, case by case; the lengths that trained under a limit, and those that did not."""
    on = Machine.named(options.gpu)
    found: dict[str, Any] = {"machine": machine(1), "mb": options.mb, "cells": [], "longest": [], "choices": []}
    for case in (CASES[number] for number in options.cases or range(len(CASES)) if "cells" in options.part):
        measured = train(case, options.repeat)
        planned = plan_at(case, on, measured["pace"])
        found["cells"].append(asdict(case) | {"planned": planned, "measured": measured})
        told = (f"{each['bytes'] / 1e6:.0f} MB, {1e3 * each['seconds']:.0f} ms" for each in (planned, measured))
        _tell(f"{case}: planned and measured {' and '.join(told)}")
    for case in (CASES[number] for number in options.cases or LIMITED if "longest" in options.part):
        limited = replace(on, chip=replace(on.chip, memory=1e6 * options.mb))
        tokens = longest(_candidate(case), limited, case.footprints(on)) // case.ranks
        tries = (tokens, ceil(1.1 * tokens))
        trained = [trains(replace(case, tokens=number), 1e6 * options.mb) for number in tries]
        found["longest"].append(asdict(case) | {"tokens": tries, "trained": trained})
        _tell(f"{case}: {tries} tokens train: {trained}")
    for held in (
        contest.CONTESTS[n] for n in options.contests or range(len(contest.CONTESTS)) if "choice" in options.part
    ):
        found["choices"].append(asdict(held) | {"candidates": held.candidates(on, options.repeat)})
        _tell(f"{held}: {contest.choice(found['choices'][-1])}")
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
        contest.show(figures["choices"])
    made = figures["machine"]
    print(f"\n{made['chip']}, torch {made['torch']}, gloo")


def _named(cell: dict[str, Any]) -> list[Any]:
    model = f"{cell['model']} {cell['pattern']}" if cell["pattern"] else f"wrapped {cell['model']}"
    return [model, cell["levers"], cell["ranks"], f"{cell['engine']}, {cell['optimizer']}"]


# Planned ------------------------------------------------------------------------------------------------------------


def _candidate(case: Case) -> Candidate:
    return Candidate(1, case.ranks, LAYOUT, SCAN, METHOD, case.engine, case.levers)


def plan_at(case: Case, on: Machine, pace: float) -> dict[str, Any]:
    """Of a step at this pace of the machine, which what wires take is brought to as well: its cores carry them."""
    whole = case.tokens * case.ranks
    told = estimate(_candidate(case), Job(whole, whole, 1, case.ranks), on, case.footprints(on))
    probed = on.among(case.ranks, case.ranks).pace
    slower = pace / probed if probed else 1.0
    items = {item: slower * seconds for item, seconds in told.items.items()}
    return {"bytes": told.bytes, "seconds": slower * told.seconds, "memory": told.memory, "items": items}
