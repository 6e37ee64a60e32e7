"""`lasp bench WHAT`: what our code does beside its peers, in one run on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from lasp.launch.bench import attention, convergence, kernels

BENCHMARKS = {"kernels": kernels, "attention": attention, "convergence": convergence}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark: print its table, and write its figures where `--json FILE` says."""
    parser = argparse.ArgumentParser(prog="lasp bench", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=(benchmark.__doc__ or "").splitlines()[0])
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
        command.add_argument("--repeat", type=int, default=9, metavar="N", help="repetitions per contestant")
        benchmark.add_options(command)
    options = parser.parse_args(argv)
    figures = BENCHMARKS[options.what].measure(options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    BENCHMARKS[options.what].show(figures)
    return 0
