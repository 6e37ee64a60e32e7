"""`lasp linearize MODEL --method lolcats --data TEXT --output FOLDER`: a softmax model into a linear one.

    lasp linearize ./llama --method lolcats --data stdlib --seq-len 4096 --sp 4 --output runs/linear

First the new layers learn to do as the softmax layers did (LoLCATs; Liger adds nothing that could), then adapters are
trained end to end, by `lasp train`. The output folder receives `model/`, which `lasp.linearize(folder)` reads, and a
report: the error of every layer, and perplexities of what is held out, before and after. Started again, the same
command goes on where it was.
"""

import math
import os
import shutil
import sys
from argparse import Namespace
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from lasp.launch.cli import SAVED, Parser
from lasp.launch.linearize_report import Report
from lasp.launch.lock import locked
from lasp.launch.outcome import Failure
from lasp.launch.place import run_command
from lasp.launch.ranks import loopback, run_ranks
from lasp.launch.stop import Stop
from lasp.linearize.convert import linearize, read
from lasp.linearize.methods import METHODS
from lasp.parallel.group import join_world
from lasp.train.checkpoints.export import export
from lasp.train.checkpoints.folders import checkpoint_folder, checkpoint_step, list_checkpoints
from lasp.train.config import DataConfig, LoraConfig, OptimizerConfig, TrainConfig, ValidationConfig
from lasp.train.loop import StepError, train
from lasp.train.metrics import read_metrics
from lasp.train.ranks import Ranks, check_device
from lasp.train.run import Run
from lasp.train.transfer import measure, transfer
from lasp.wrap.parallelize import parallelize, unparallelize

TRANSFERRED = "transferred"
"""The folder of the model after the first stage."""

_FREE = {"sp", "dp", "layout", "device", "save_every", "output"}  # who computes it, and where


def main(argv: list[str] | None = None) -> int:
    """Linearise. Returns what `lasp train` does."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command(lambda: _start(arguments), lambda: as_rank(arguments))


def as_rank(arguments: list[str]) -> int:
    """Linearise as one of several ranks."""
    options, error = None, None
    try:
        options = _read(arguments)
    except ValueError as found:
        error = str(found)
    told = {} if options is None else {"arguments": str(sorted(vars(options).items()))}
    join_world().agree("reading the arguments", told, error).wait()
    assert options is not None, "or there was an error, and everyone has raised it"
    return _linearize(options)


def _start(arguments: list[str]) -> int:
    options = _read(arguments)
    ranks = options.sp * (options.dp or 1)
    check_device(options.device, ranks)
    with locked(Path(options.output)):
        Run.prepare(_first_stage(options), print)
        if ranks > 1:
            return run_ranks("lasp.launch.linearize", arguments, ranks, patience=math.inf)
        os.environ.update(loopback())
        return _linearize(options)


def _read(arguments: list[str]) -> Namespace:
    parser = Parser(prog="lasp linearize", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="folder or name on the hub of a causal language model")
    parser.add_argument("--method", required=True, choices=sorted(METHODS))
    parser.add_argument("--layers", default="all", help='"all", a share such as 1/2, or places such as 0,2,4')
    parser.add_argument("--window", type=int, default=64, help="tokens that softmax attention keeps")
    parser.add_argument("--data", default="stdlib", help="as data.source of lasp train")
    parser.add_argument("--tokenizer", help="as data.tokenizer of lasp train; by default the model's")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--held-out", type=float, default=0.05, help="share of the documents that is measured")
    parser.add_argument("--held-out-sequences", type=int, help="at most so many sequences of it")
    parser.add_argument("--transfer-steps", type=int, default=200, help="of the first stage")
    parser.add_argument("--transfer-lr", type=float, default=3e-2)
    parser.add_argument("--steps", type=int, default=200, help="of the second stage; 0 leaves it out")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--sp", type=int, default=1)
    parser.add_argument("--dp", type=int)
    parser.add_argument("--layout", default="contiguous", choices=("contiguous", "zigzag"))
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, help="steps between two states that a run goes on from")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    options = parser.parse_args(arguments)
    for name, least in (("transfer_steps", 0), ("steps", 0), ("rank", 1), ("window", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    if options.steps and find_spec("peft") is None:
        raise ValueError("adapters need peft: pip install peft, or --steps 0")
    if not 0 < options.held_out < 1:
        raise ValueError(
            f"--held-out must lie between 0 and 1, got {options.held_out}: a report needs what is held out"
        )
    return options


def _first_stage(options: Namespace) -> TrainConfig:
    output = Path(options.output)
    return TrainConfig(
        output=str(output),
        steps=max(options.transfer_steps, 1),
        save_every=options.save_every,
        seed=options.seed,
        device=options.device,
        sp=options.sp,
        dp=options.dp,
        layout=options.layout,
        model={"name": options.model},
        data=DataConfig(
            source=options.data,
            tokenizer=options.tokenizer or options.model,
            seq_len=options.seq_len,
            batch_size=options.batch_size,
            cache=str(output / "tokens"),
        ),
        validation=ValidationConfig(fraction=options.held_out, every=10**9, sequences=options.held_out_sequences),
        optimizer=OptimizerConfig(lr=options.transfer_lr, min_lr=options.transfer_lr / 10),
    )


def _second_stage(options: Namespace) -> TrainConfig:
    output, first = Path(options.output), _first_stage(options)
    return replace(
        first,
        output=str(output / "adapters"),
        steps=options.steps,
        resume="latest",
        model={"name": str(output / TRANSFERRED)},
        lora=LoraConfig(rank=options.rank, alpha=2.0 * options.rank),
        optimizer=OptimizerConfig(lr=options.lr, min_lr=options.lr / 10, weight_decay=0.0),
    )


def _linearize(options: Namespace) -> int:
    disable_progress_bar()  # transformers shows one for every file it reads or writes
    config, output, stop = _first_stage(options), Path(options.output), Stop()
    ranks = Ranks.join(config)
    run = Run.prepare_together(config, ranks.everyone)
    asked = {name: value for name, value in vars(options).items() if name not in _FREE}
    report = ranks.together(lambda: Report.open(output, asked))
    with stop.listening():
        try:
            finished = _transferred(run, ranks, options, report, stop) and _trained(ranks, options, report, stop)
        except StepError as error:
            raise Failure(str(error)) from error
    main = ranks.is_main
    ranks.leave()
    if not finished:
        if main:
            print("lasp: told to stop, saved: the same command goes on", file=sys.stderr, flush=True)
        return SAVED
    if main:
        report.tell()
    return 0


def _transferred(run: Run, ranks: Ranks, options: Namespace, report: Report, stop: Stop) -> bool:
    """The first stage, whose model is written into a folder of its own; whether it came to its end."""
    output = Path(options.output)
    if "transferred" in report.found:
        return True
    model = ranks.together(lambda: _converted(options))
    model = parallelize(model.to(ranks.device), ranks.sequence)
    if "converted" not in report.found:
        before = measure(model, run, ranks)
        report.note(ranks, {"teacher": before.teacher, "converted": before.loss, "errors before": before.errors})
    steps = options.transfer_steps if METHODS[options.method].trained else 0
    tell = print if ranks.is_main else (lambda _: None)
    if steps and not transfer(model, run, ranks, run.config.optimizer, output / "transfer.pt", stop, tell):
        return False
    after = measure(model, run, ranks)
    if ranks.is_main:
        unparallelize(model).save_pretrained(output / TRANSFERRED)
        run.tokenizer.save(output / TRANSFERRED)
    report.note(ranks, {"transferred": after.loss, "errors after": after.errors})
    return True


def _converted(options: Namespace) -> Any:
    layers = options.layers
    if layers != "all" and "/" not in layers:
        if not all(place.isdecimal() for place in layers.split(",")):
            raise ValueError(f"--layers must be all, a share such as 1/2, or places such as 0,2,4, got {layers!r}")
        layers = [int(place) for place in layers.split(",")]
    return linearize(read(options.model, dtype="float32"), options.method, layers=layers, window=options.window)


def _trained(ranks: Ranks, options: Namespace, report: Report, stop: Stop) -> bool:
    """The second stage; whether it came to its end. The model with its adapters merged is written."""
    output = Path(options.output)
    if options.steps and "trained" not in report.found:
        config = _second_stage(options)
        steps = [checkpoint_step(path) for path in list_checkpoints(checkpoint_folder(config.output))]
        if max(steps, default=0) < options.steps:
            summary = train(Run.prepare_together(config, ranks.everyone), ranks, stop)
            if summary.stopped:
                return False
        ranks.barrier()
        held = read_metrics(output / "adapters" / "metrics.jsonl")[-1].validation or {}
        report.note(ranks, {"trained": sum(held.values()) / len(held)})
    if ranks.is_main and not (output / "model").exists():
        _merge(output, options.steps)
    ranks.barrier()
    return True


def _merge(output: Path, steps: int) -> None:
    model: Any = read(output / TRANSFERRED, dtype="float32")
    if steps:
        from peft import PeftModel

        last = max(list_checkpoints(checkpoint_folder(str(output / "adapters"))), key=checkpoint_step)
        shutil.rmtree(output / "peft", ignore_errors=True)
        export(last, output / "peft")
        model = PeftModel.from_pretrained(model, output / "peft").merge_and_unload()
    model.save_pretrained(output / "model")
    for file in (output / TRANSFERRED).glob("*token*"):
        (output / "model" / file.name).write_bytes(file.read_bytes())


if __name__ == "__main__":
    sys.exit(main())
