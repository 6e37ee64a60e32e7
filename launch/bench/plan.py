"""Plans beside what was measured: the memory of a rank and the time of a step, on the ranks of this machine, in fp32.

Every case is planned and trained in turn. A rank's memory is the most that it holds in a step, by the kernel's own
mark, beyond what it held when its libraries were at work; a step is the median of some. `--part longest`: the longest
sequence that is planned into a limit on memory is trained under it (RLIMIT_DATA), and one that is a tenth longer.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from math import ceil
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import lasp
from lasp.launch.bench.memory import ENVIRONMENT
from lasp.launch.bench.resident import begin_peak, status
from lasp.launch.bench.table import markdown
from lasp.launch.bench.timing import machine
from lasp.launch.plan.candidate import LEVERS, Candidate, Job
from lasp.launch.plan.estimate import estimate
from lasp.launch.plan.footprint import Footprints, Setting
from lasp.launch.plan.report import longest
from lasp.launch.simulate.machine import Machine
from lasp.train.config import EngineName, LoraConfig, OptimizerConfig, OptimizerName
from lasp.train.model import ModelPlan, pull
from lasp.train.optimizer import build_optimizers

SIZES: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
WRAPPED: dict[str, dict[str, Any]] = {  # of a kind of Hugging Face model, beside SIZES
    "qwen3": {"num_key_value_heads": 2, "head_dim": 64},
    "qwen3_next": {
        "num_key_value_heads": 2, "head_dim": 64, "mlp_only_layers": [0, 1, 2, 3], "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    },
    "mamba2": {"num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 1, "expand": 2, "chunk_size": 64},
}  # fmt: skip
WARM = 2  # steps until DDP has its buckets in the order of the gradients


@dataclass(frozen=True)
class Case:
    """A training. model: a mixer and its pattern, or a kind of Hugging Face model. tokens: of each rank."""

    model: str
    pattern: str = ""
    levers: str = "none"
    ranks: int = 1
    engine: EngineName = "ddp"
    optimizer: OptimizerName = "adamw"
    tokens: int = 2048

    @property
    def plan(self) -> ModelPlan:
        """The model that is planned, and built."""
        return ModelPlan(_configuration(self.model, self.pattern), None, LoraConfig())


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
LIMITED = (0, 2, 7, 11, 13)  # of the cases, those whose longest sequence is looked for


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which cases, and what of them."""
    parser.add_argument("--part", choices=["cells", "longest"], nargs="+", default=["cells"])
    parser.add_argument(
        "--cases", type=int, choices=range(len(CASES)), nargs="+", metavar="N", help="by number, from 0"
    )
    parser.add_argument("--mb", type=float, default=300.0, help="limit of --part longest, of each rank")
    parser.add_argument("--gpu", default="cpu", help="what `lasp plan --gpu` takes, for the times")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Planned and measured, case by case; the lengths that trained under a limit, and those that did not."""
    on = Machine.named(options.gpu)
    found: dict[str, Any] = {"machine": machine(1), "mb": options.mb, "cells": [], "longest": []}
    chosen = options.cases or range(len(CASES))
    for case in (CASES[number] for number in chosen if "cells" in options.part):
        planned, measured = _plan(case, on), _train(case, options.repeat)
        found["cells"].append(asdict(case) | {"planned": planned, "measured": measured})
        _tell(f"{case}: {planned['bytes'] / 1e6:.0f} MB planned, {measured['bytes'] / 1e6:.0f} measured")
    for case in (CASES[number] for number in chosen if "longest" in options.part and number in LIMITED):
        limited = replace(on, chip=replace(on.chip, memory=1e6 * options.mb))
        tokens = longest(_candidate(case), limited, _footprints(case, on)) // case.ranks
        tries = (tokens, ceil(1.1 * tokens))
        trained = [_trains(replace(case, tokens=number), 1e6 * options.mb) for number in tries]
        found["longest"].append(asdict(case) | {"tokens": tries, "trained": trained})
        _tell(f"{case}: {tries} tokens train: {trained}")
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
        near = sum(abs(float(row[7])) <= 5 for row in rows)
        print(f"\nmemory within 5 % in {near} of {len(rows)}")
    if figures["longest"]:
        rows = [[*_named(c), c["tokens"][0], *("trains" if t else "does not" for t in c["trained"])]
                for c in figures["longest"]]  # fmt: skip
        print(f"\nlongest sequence in {figures['mb']:.0f} MB beyond what the libraries hold")
        print(markdown([*told, "it", "a tenth more"], rows))
    made = figures["machine"]
    print(f"\n{made['chip']}, torch {made['torch']}, gloo")


def _named(cell: dict[str, Any]) -> list[Any]:
    model = f"{cell['model']} {cell['pattern']}" if cell["pattern"] else f"wrapped {cell['model']}"
    return [model, cell["levers"], cell["ranks"], f"{cell['engine']}, {cell['optimizer']}"]


def _configuration(model: str, pattern: str) -> Any:
    from transformers import CONFIG_MAPPING

    from lasp.models import LinearLlamaConfig

    if pattern:
        return LinearLlamaConfig(**SIZES, mixer=model, pattern=pattern)
    return CONFIG_MAPPING[model](**{**SIZES, **WRAPPED[model]})


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


# Measured -----------------------------------------------------------------------------------------------------------


def _train(case: Case, repeat: int) -> dict[str, float]:
    """Of the worst rank."""
    own = in_ranks(case, _measure, repeat)
    return {key: max(found[key] for found in own) for key in ("bytes", "seconds")}


def _trains(case: Case, limit: float) -> bool:
    """Whether every rank comes to the end of its steps with so many bytes beyond what its libraries hold."""
    with suppress(mp.ProcessExitedException, mp.ProcessRaisedException):
        return len(in_ranks(case, _attempt, limit)) == case.ranks
    return False


def in_ranks(case: Case, work: Any, given: float) -> list[Any]:
    """What `work` returns on each rank."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, ENVIRONMENT):
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload([__name__, "lasp.models"])
        mp.start_processes(_rank, (folder, case, work, given), nprocs=case.ranks, start_method="forkserver")
        return [json.loads(file.read_text(encoding="ascii")) for file in Path(folder).glob("rank*")]


def _rank(rank: int, folder: str, case: Case, work: Any, given: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.ranks, timeout=timedelta(minutes=30)
    )
    group = lasp.SequenceGroup.from_group()
    Training(case, group).step(64)  # the libraries' own memory
    gc.collect()
    found = work(case, group, given)
    Path(folder, f"rank{rank}").write_text(json.dumps(found), encoding="ascii")
    lasp.shutdown()


def _measure(case: Case, group: lasp.SequenceGroup, repeat: float) -> dict[str, float]:
    before = status("RssAnon")
    training = Training(case, group)
    for _ in range(WARM):
        training.step(case.tokens)
    begin_peak()
    seconds = [training.step(case.tokens) for _ in range(int(repeat))]
    return {"bytes": status("VmHWM") - status("RssFile") - before, "seconds": statistics.median(seconds)}


def _attempt(case: Case, group: lasp.SequenceGroup, limit: float) -> int:
    """Steps under a limit on what the process may ask the system for."""
    most = status("VmData") + int(limit)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    training = Training(case, group)
    return len([training.step(case.tokens) for _ in range(WARM + 1)])


class Training:
    """Steps of a model over a group."""

    def __init__(self, case: Case, group: lasp.SequenceGroup) -> None:
        model = lasp.parallelize(case.plan.build(0, torch.float32), group, attention="ring", scan="gather")
        self.model: Any = pull(model, LEVERS[case.levers])
        self.module: Any = lasp.data_parallel(self.model, group, case.engine)  # type: ignore[arg-type]
        self.optimizers = build_optimizers(self.model, OptimizerConfig(name=case.optimizer))
        self.group = group

    def step(self, tokens: int) -> float:
        """Seconds of one over so many tokens of each rank, as `lasp train` makes it."""
        ids = torch.randint(64, (1, tokens * self.group.size), generator=torch.Generator().manual_seed(1))
        batch = lasp.shard_batch({"input_ids": ids, "labels": ids}, self.group)
        started = time.perf_counter()
        self.module(**batch, num_items_in_batch=tokens * self.group.size).loss.backward()
        lasp.clip_grad_norm_(self.model, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - started
