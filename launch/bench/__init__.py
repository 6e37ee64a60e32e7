"""`lasp bench WHAT`: what our code does beside its peers, in one run on this machine."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from lasp.launch.bench import (
    attention,
    chip,
    compilation,
    convergence,
    cuda,
    kernels,
    memory,
    model,
    plan,
    report,
    scaling,
    scan,
    step,
    wrapped,
)
from lasp.launch.bench.options import at_least
from lasp.launch.files import check_outputs

BENCHMARKS = {
    "kernels": kernels,
    "attention": attention,
    "step": step,
    "scan": scan,
    "memory": memory,
    "plan": plan,
    "model": model,
    "scaling": scaling,
    "chip": chip,
    "wrapped": wrapped,
    "convergence": convergence,
}
TRITON = {"--compile-only": compilation, "--device cuda": cuda}
"""Those of Triton's kernels, by the option of `lasp bench kernels` that asks for them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark: print its table, and write its figures where `--json FILE` says."""
    parser = argparse.ArgumentParser(prog="lasp bench", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=(benchmark.__doc__ or "").splitlines()[0])
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
        command.add_argument("--repeat", type=at_least(1), default=9, metavar="N", help="repetitions per contestant")
        benchmark.add_options(command)
        for option, triton in TRITON.items() if name == "kernels" else ():
            triton.add_options(command.add_argument_group(f"with {option}"))
    written = commands.add_parser("report", help=(report.__doc__ or "").splitlines()[0])
    written.add_argument("--document", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args(argv)
    if options.what == "report":
        return _report(parser, options.document)
    if options.what == "kernels" and options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none here")
    try:
        check_outputs({"--json": options.json, "--plot": getattr(options, "plot", None)})
    except ValueError as error:
        parser.error(str(error))
    benchmark = _choose(options)
    figures = benchmark.measure(options)
    if options.json:
        line = shlex.join(["lasp", "bench", *(sys.argv[2:] if argv is None else argv)])
        told = {"benchmark": options.what, "command": line, **figures}
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    benchmark.show(figures)
    return 0


def _report(parser: argparse.ArgumentParser, document: Path) -> int:
    """Write a document's sections anew."""
    if not document.is_file():
        parser.error(f"--document {document}: there is no such file")
    try:
        files = report.report(document, BENCHMARKS)
    except ValueError as error:
        parser.error(str(error))
    print(f"{document}: {len(files)} sections, of {', '.join(map(str, files)) or 'no figures'}")
    return 0


def _choose(options: argparse.Namespace) -> ModuleType:
    """The module that measures what was asked for."""
    if options.what != "kernels" or (options.device == "cpu" and not options.compile_only):
        return BENCHMARKS[options.what]
    return TRITON["--compile-only" if options.compile_only else "--device cuda"]
