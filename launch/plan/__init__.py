"""`lasp plan`: which layout trains a model on given machines, with what memory, how fast, and at what price.

    lasp plan --model 1b --seq 131072 --tokens-per-step 1048576 --gpu h100 --nodes 2 --gpus 8
    lasp plan --model train.toml --seq 65536 --tokens-per-step 65536 --gpu h100 --levers choose --write planned.toml
    lasp plan --reproduce

Memory comes from the model's own modules, run without values; times from data sheets and stated shares of them, or from
the file that --gpu names. docs/planning.md tells how both are made, and how far off they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from lasp.launch.bench.options import at_least
from lasp.launch.cli import Parser
from lasp.launch.files import check_outputs
from lasp.launch.outcome import Outcome
from lasp.launch.plan import report
from lasp.launch.plan.candidate import LEVERS, Candidate, Job, candidates
from lasp.launch.plan.estimate import Estimate, estimate, ranked
from lasp.launch.plan.footprint import Footprints, Setting
from lasp.launch.simulate import published
from lasp.launch.simulate.machine import MACHINES, Machine
from lasp.parallel.layout import LAYOUTS
from lasp.parallel.scan import SCANS
from lasp.train.config import Dtype, LoraConfig, MemoryConfig, OptimizerName, TrainConfig
from lasp.train.model import ModelPlan

ENGINES = ("ddp", "fsdp2")
METHODS = ("ring", "gather", "ulysses")
WHOLE = ("muon", "adafactor")
"""Optimizers whose memory depends on matrices being whole."""


def main(argv: list[str] | None = None) -> int:
    """Plan. Exit code 0, 1 where nothing fits, 2 for a user error."""
    return Outcome.of(lambda: _plan(sys.argv[1:] if argv is None else argv)).tell()


def _plan(argv: list[str]) -> int:
    if "--reproduce" in argv:
        print(published.report())
        return 0
    options = _parser().parse_args(argv)
    if options.price is not None and not 0 <= options.price < float("inf"):
        raise ValueError(f"--price must not be negative, got {options.price}")
    check_outputs({f"--{name}": getattr(options, name) for name in ("json", "plot", "trace", "write")})
    job = Job(options.seq, options.tokens_per_step, options.nodes, options.gpus)
    machine = Machine.named(options.gpu)
    if options.memory is not None:
        machine = replace(machine, chip=replace(machine.chip, memory=_bytes(options.memory)))
    model, fields, files, optimizer = read_model(options.model)
    optimizer = options.optimizer or optimizer
    footprints = Footprints(
        Setting(model, MemoryConfig(), options.layout, "gather", "ring", options.dtype, machine.wires, optimizer)
    )
    scans, methods, engines, levers = (
        _chosen(getattr(options, name), known)
        for name, known in (("scan", (*SCANS,)), ("method", METHODS), ("engine", ENGINES), ("levers", (*LEVERS,)))
    )
    if optimizer in WHOLE and job.ranks > 1:
        if options.engine != "choose" and "fsdp2" in engines:
            raise ValueError(f"{optimizer} over the shares of fsdp2 is not planned: take --engine ddp")
        engines = ["ddp"]
    found: list[Estimate] = []
    for candidate in candidates(job, options.layout, scans, methods, engines, levers):  # type: ignore[arg-type]
        try:
            found.append(estimate(candidate, job, machine, footprints))
        except ValueError as error:
            print(f"{candidate}: {error}", file=sys.stderr)
    if not found:
        raise ValueError(f"no dp x sp of {job.ranks} ranks divides {job.seq} tokens and {job.tokens} tokens per step")
    found = ranked(found)
    print(report.table(found, options.price, options.top))
    if found[0].fits:
        best, memory = found[0].candidate, machine.chip.memory / report.GIB
        print(f"\nlongest sequence of {best} in {memory:.3g} GiB: {report.longest(best, machine, footprints)} tokens")
    _write(options, found, job, fields, files)
    if options.plot:
        report.plot(found[0].candidate, levers, machine, footprints, options.plot)
    return 0 if found[0].fits else 1


def _write(
    options: argparse.Namespace, found: list[Estimate], job: Job, fields: dict[str, Any], files: list[str]
) -> None:
    """The files that were asked for."""
    best = found[0]
    if options.json:
        options.json.write_text(json.dumps(report.told(found, options.price), indent=2) + "\n", encoding="utf-8")
    if not best.fits:
        return
    if options.trace and best.timeline is not None:
        best.timeline.write(options.trace, job.node_size)
    if options.write:
        options.write.write_text(
            report.config(best, _with_exchange(fields, best.candidate), options.dtype), encoding="utf-8"
        )
        print(f"\n{report.launch_line(job, [*files, str(options.write)])}")


def _with_exchange(fields: dict[str, Any], candidate: Candidate) -> dict[str, Any]:
    """Of our own models the configuration says how states and keys are shared."""
    own = candidate.sp > 1 and "name" not in fields
    return fields | ({"scan": candidate.scan, "attention": candidate.method} if own else {})


def _bytes(gib: float) -> float:
    if not 0 < gib < float("inf"):
        raise ValueError(f"--memory must be positive, got {gib}")
    return gib * report.GIB


def _chosen(given: str, known: tuple[str, ...]) -> list[str]:
    if given == "choose":
        return list(known)
    names = given.split(",")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown {', '.join(unknown)}; choose from {', '.join(known)}, or say choose for all")
    return names


def check_planned(config: TrainConfig) -> None:
    """ValueError for what a configuration sets that no plan knows and `--write` does not override."""
    own, shards = config.memory, config.fsdp2
    asked = {"tp": config.tp > 1, "memory.offload": own.offload, "fsdp2.offload": shards.offload,
             "fsdp2.reshard": not shards.reshard, "compile": config.compile,
             "reduce_dtype": config.reduce_dtype is not None}  # fmt: skip
    if named := [name for name, is_set in asked.items() if is_set]:
        raise ValueError(f"not planned: {', '.join(named)} of the configuration; leave out what is not to be planned")


def read_model(name: str) -> tuple[ModelPlan, dict[str, Any], list[str], OptimizerName]:
    """A preset, a configuration of `lasp train`, or what `lasp verify` takes; the fields that a configuration names it
    by, the file that has them already, and the optimizer. ValueError where there is none, or it is refused."""
    from lasp.launch.configuration import read_config
    from lasp.launch.verify import configuration
    from lasp.models import LinearLlamaConfig
    from lasp.models.config import PRESETS
    from lasp.train.data.tokenizer import load_tokenizer
    from lasp.wrap.refusal import check_model

    if name.endswith(".toml"):
        config = read_config([name])
        check_planned(config)
        if (packing := config.data.packing) != "none":
            print(f"planned as one document per sequence, where data.packing = {packing!r} lays many", file=sys.stderr)
        model = ModelPlan.make(config.model, config.lora, load_tokenizer(config.tokenizer))
        fields = {key: config.model[key] for key in ("name",) if key in config.model}
        return model, fields, [name], config.optimizer.name
    if name in PRESETS:
        return ModelPlan(LinearLlamaConfig.preset(name), None, LoraConfig()), {"preset": name}, [], "adamw"
    model = ModelPlan(configuration(name), None, LoraConfig())
    check_model(model.skeleton())
    return model, {"name": name}, [], "adamw"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lasp plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="a preset, a TOML file of `lasp train`, or what `lasp verify` takes"
    )
    parser.add_argument("--seq", type=int, required=True, help="tokens of a whole sequence")
    parser.add_argument("--tokens-per-step", type=int, required=True, help="of all ranks")
    parser.add_argument("--gpu", default="h100", help=f"{', '.join(MACHINES)}, or a JSON file (docs/planning.md)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a rank, by default the chip's")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--gpus", type=int, default=8, help="ranks of each")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="bfloat16", help="of the computation")
    parser.add_argument("--layout", choices=LAYOUTS, default="contiguous")
    for name, default, known in (("scan", "choose", SCANS), ("method", "ring", METHODS), ("engine", "choose", ENGINES),
                                 ("levers", "none", LEVERS)):  # fmt: skip
        parser.add_argument(f"--{name}", default=default, help=f"some of {', '.join(known)}, or choose")
    parser.add_argument("--optimizer", choices=get_args(OptimizerName), help="by default the file's, or adamw")
    parser.add_argument("--price", type=float, help="of a chip and an hour")
    parser.add_argument("--top", type=at_least(1), default=10, help="lines of the table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all candidates there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the longest sequence against ranks")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write the best one's step as a Chrome trace")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a configuration of `lasp train`")
    parser.add_argument("--reproduce", action="store_true", help="print published figures beside simulated ones")
    return parser


if __name__ == "__main__":
    sys.exit(main())
