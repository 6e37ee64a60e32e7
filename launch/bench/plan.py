"""Plans beside what was measured: the memory of a rank and the time of a step, on the ranks of this machine, in fp32.

Every configuration is planned and trained in turn. A rank's memory is what it holds beyond what it held when its
libraries were at work, at its worst moment; a step is the median of some.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import lasp
from lasp.launch.bench.memory import ENVIRONMENT
from lasp.launch.bench.options import at_least
from lasp.launch.bench.resident import AnonymousPeak, status
from lasp.launch.bench.table import markdown
from lasp.launch.bench.timing import machine
from lasp.launch.plan.candidate import LEVERS, Candidate, Job
from lasp.launch.plan.estimate import estimate
from lasp.launch.plan.footprint import Footprints, Setting
from lasp.launch.simulate.machine import Machine
from lasp.train.config import LoraConfig
from lasp.train.model import ModelPlan, pull

SIZES: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which configurations."""
    parser.add_argument("--mixers", nargs="+", default=["lightning", "gla", "gated_deltanet", "mamba2"])
    parser.add_argument("--patterns", nargs="+", default=["L", "LLLN"])
    parser.add_argument("--ranks", type=at_least(1), nargs="+", default=[1, 2])
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=["none", "checkpoints"])
    parser.add_argument("--tokens", type=at_least(64), default=4096, help="of each rank")
    parser.add_argument("--gpu", default="cpu", help="what `lasp plan --gpu` takes, for the times")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Planned and measured, cell by cell."""
    found: dict[str, Any] = {"machine": machine(1), "tokens": options.tokens, "cells": []}
    on = Machine.named(options.gpu)
    for mixer in options.mixers:
        for pattern in options.patterns:
            fields = {**SIZES, "mixer": mixer, "pattern": pattern}
            for ranks in options.ranks:
                for lever in options.levers:
                    cell = {"mixer": mixer, "pattern": pattern, "ranks": ranks, "levers": lever}
                    cell["planned"] = _plan(fields, ranks, lever, options.tokens, on)
                    cell["measured"] = _train(fields, ranks, lever, options.tokens, options.repeat)
                    found["cells"].append(cell)
    return found


def show(figures: dict[str, Any]) -> None:
    """A line per cell, with signed errors."""
    headings = [
        "mixer",
        "pattern",
        "ranks",
        "levers",
        "MB planned",
        "measured",
        "off, %",
        "ms planned",
        "measured",
        "off, %",
    ]
    rows = []
    for cell in figures["cells"]:
        one, two = cell["planned"], cell["measured"]
        off = [100 * (one[key] / two[key] - 1) for key in ("bytes", "seconds")]
        rows.append(
            [cell["mixer"], cell["pattern"], cell["ranks"], cell["levers"], f"{one['bytes'] / 1e6:.0f}",
             f"{two['bytes'] / 1e6:.0f}", f"{off[0]:+.1f}", f"{1e3 * one['seconds']:.0f}",
             f"{1e3 * two['seconds']:.0f}", f"{off[1]:+.0f}"]
        )  # fmt: skip
    print(markdown(headings, rows))
    made = figures["machine"]
    print(f"\n{figures['tokens']} tokens of a rank; {made['chip']}, torch {made['torch']}, gloo")


def _plan(fields: dict[str, Any], ranks: int, lever: str, tokens: int, on: Machine) -> dict[str, Any]:
    from lasp.models import LinearLlamaConfig

    candidate = Candidate(1, ranks, "contiguous", "gather", "ring", "ddp", lever)
    job = Job(tokens * ranks, tokens * ranks, 1, ranks)
    model = ModelPlan(LinearLlamaConfig(**fields), None, LoraConfig())
    setting = Setting(model, LEVERS[lever], "contiguous", "gather", "ring", "float32", on.wires)
    told = estimate(candidate, job, on, Footprints(setting))
    return {"bytes": told.bytes, "seconds": told.seconds, "memory": told.memory, "items": told.items}


def _train(fields: dict[str, Any], ranks: int, lever: str, tokens: int, repeat: int) -> dict[str, float]:
    """Of the worst rank."""
    told = {"fields": fields, "ranks": ranks, "levers": lever, "tokens": tokens, "repeat": repeat}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, ENVIRONMENT):
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload([__name__, "lasp.models"])
        mp.start_processes(_rank, (folder, json.dumps(told)), nprocs=ranks, start_method="forkserver")
        own = [json.loads(file.read_text(encoding="ascii")) for file in Path(folder).glob("rank*")]
    return {key: max(found[key] for found in own) for key in ("bytes", "seconds")}


def _rank(rank: int, folder: str, shared: str) -> None:
    told = json.loads(shared)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=told["ranks"], timeout=timedelta(minutes=30)
    )
    group = lasp.SequenceGroup.from_group()
    small = {**told["fields"], "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
    _Training(small, group, told["levers"]).step(256)  # the libraries' own memory
    before = status("RssAnon")
    training = _Training(told["fields"], group, told["levers"])
    training.step(told["tokens"])  # the optimizer's states
    with AnonymousPeak() as peak:
        seconds = [training.step(told["tokens"]) for _ in range(told["repeat"])]
    found = {"bytes": peak.bytes - before, "seconds": statistics.median(seconds)}
    Path(folder, f"rank{rank}").write_text(json.dumps(found), encoding="ascii")
    lasp.shutdown()


class _Training:
    """Steps of a model over a group."""

    def __init__(self, fields: dict[str, Any], group: lasp.SequenceGroup, lever: str) -> None:
        from lasp.models import LinearLlamaConfig, LinearLlamaForCausalLM

        torch.manual_seed(0)
        config = LinearLlamaConfig(**fields, scan="gather", attention="ring")
        self.model: Any = pull(lasp.parallelize(LinearLlamaForCausalLM(config).train(), group), LEVERS[lever])
        self.module: Any = lasp.data_parallel(self.model, group, "ddp")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        self.group = group

    def step(self, tokens: int) -> float:
        """Seconds of one over so many tokens of each rank."""
        ids = torch.randint(64, (1, tokens * self.group.size), generator=torch.Generator().manual_seed(1))
        batch = lasp.shard_batch({"input_ids": ids, "labels": ids}, self.group)
        started = time.perf_counter()
        self.module(**batch, num_items_in_batch=tokens * self.group.size).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started
