"""A training step of a deep, narrow hybrid over ranks: what the ranks have to say to each other besides data.

Ranks are gloo processes of this machine. `--against FOLDER` runs another checkout of lasp in turns with this one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from lasp.launch.bench import step_rank
from lasp.launch.bench.options import at_least
from lasp.launch.bench.ranks import Start, run
from lasp.launch.bench.table import markdown
from lasp.launch.bench.timing import machine

HERE = Path(__file__).parents[3]  # of lasp/launch/bench


def add_options(parser: argparse.ArgumentParser) -> None:
    """The model, the numbers of ranks, and what to compare with."""
    parser.add_argument("--ranks", type=at_least(1), nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=at_least(4, multiples=4), default=24, help="LLLN, over and over")
    parser.add_argument("--tokens", type=at_least(1), default=1024, help="of the whole sequence")
    parser.add_argument("--steps", type=at_least(1), default=5, help="of each run; --repeat runs")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout of lasp")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Per number of ranks and kind of batch the median step of each checkout, and its exchanges."""
    trees = {"this": HERE} | ({} if options.against is None else {"before": options.against.resolve()})
    shape = {name: getattr(options, name) for name in ("layers", "tokens", "steps")}
    cells = []
    for ranks in options.ranks:
        for packed in (False, True):
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
            for _ in range(options.repeat):
                for name, tree in trees.items():
                    runs[name].append(_run(tree, {"ranks": ranks, "packed": packed, **shape}))
            found = {
                name: own[0] | {"seconds": statistics.median(run["seconds"] for run in own)}
                for name, own in runs.items()
            }
            cells.append({"ranks": ranks, "packed": packed, "checkouts": found})
    return {"machine": machine(torch.get_num_threads()), "shape": shape, "repeat": options.repeat, "cells": cells}


def show(figures: dict[str, Any]) -> None:
    """The table: a line per number of ranks, kind of batch and checkout."""
    headings = ["ranks", "batch", "checkout", "step, ms", "headers", "exchanges of data"]
    rows = [
        [cell["ranks"], "packed" if cell["packed"] else "plain", name, f"{1e3 * run['seconds']:.0f}", run["headers"],
         run["exchanges"]]
        for cell in figures["cells"]
        for name, run in cell["checkouts"].items()
    ]  # fmt: skip
    print(markdown(headings, rows))
    told, shape = figures["machine"], figures["shape"]
    print(f"\n{shape['layers']} layers, {shape['tokens']} tokens, medians of {figures['repeat']} runs", end=" ")
    print(f"of {shape['steps']} steps; {told['chip']}, {told['threads']} threads in all, torch {told['torch']}, gloo")


def _run(tree: Path, told: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 of a run measured."""
    threads = max(1, torch.get_num_threads() // told["ranks"])
    with tempfile.TemporaryDirectory() as folder:
        shared = told | {"store": f"file://{folder}/store", "threads": threads}
        arguments = ([json.dumps(shared | {"rank": rank})] for rank in range(told["ranks"]))
        return run(step_rank.__file__, [Start(own, {"PYTHONPATH": str(tree)}) for own in arguments])[0]
