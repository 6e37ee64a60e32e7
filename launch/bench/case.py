"""A training of a small model on ranks of this machine: what it holds and takes, and whether a limit is enough."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import lasp
from lasp.launch.bench.pace import Pace
from lasp.launch.bench.resident import begin_peak, give_back_freed, keep_freed, status
from lasp.launch.plan.candidate import LEVERS
from lasp.launch.plan.footprint import Footprints, Setting
from lasp.launch.simulate.machine import Machine
from lasp.parallel.layout import Layout
from lasp.parallel.methods import Method
from lasp.parallel.scan import ScanName
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
LAYOUT: Layout = "contiguous"
SCAN: ScanName = "gather"
METHOD: Method = "ring"
WARM = 2  # steps until DDP has its buckets in the order of the gradients


@dataclass(frozen=True)
class Case:
    """A training. model: a mixer and its pattern, or a kind of Hugging Face model. ranks: that share a sequence, of
    which a step has dp at a time, and so many batches of them. tokens: of each rank in each."""

    model: str
    pattern: str = ""
    levers: str = "none"
    ranks: int = 1
    engine: EngineName = "ddp"
    optimizer: OptimizerName = "adamw"
    tokens: int = 2048
    dp: int = 1
    batches: int = 1

    @property
    def plan(self) -> ModelPlan:
        """The model that is planned, and built."""
        return ModelPlan(_configuration(self.model, self.pattern), None, LoraConfig())

    def footprints(self, on: Machine) -> Footprints:
        """What a plan reads of the model's steps."""
        levers = LEVERS[self.levers]
        return Footprints(Setting(self.plan, levers, LAYOUT, SCAN, METHOD, "float32", on.wires, self.optimizer))


def _configuration(model: str, pattern: str) -> Any:
    from transformers import CONFIG_MAPPING

    from lasp.models import LinearLlamaConfig

    if pattern:
        return LinearLlamaConfig(**SIZES, mixer=model, pattern=pattern)
    return CONFIG_MAPPING[model](**{**SIZES, **WRAPPED[model]})


def train(case: Case, repeat: int) -> dict[str, float]:
    """The most bytes of any rank, the seconds of the slowest, and the pace of the machine as that one saw it."""
    own = in_ranks(case, _measure, repeat)
    return max(own, key=lambda found: found["seconds"]) | {"bytes": max(found["bytes"] for found in own)}


def trains(case: Case, limit: float) -> bool:
    """Whether every rank comes to the end of its steps with so many bytes beyond what its libraries hold."""
    with suppress(mp.ProcessExitedException, mp.ProcessRaisedException):
        return len(in_ranks(case, _attempt, limit)) == case.dp * case.ranks
    return False


def in_ranks(case: Case, work: Any, given: float) -> list[Any]:
    """What `work` returns on each rank."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload([__name__, "lasp.models"])
        mp.start_processes(_rank, (folder, case, work, given), nprocs=case.dp * case.ranks, start_method="forkserver")
        return [json.loads(file.read_text(encoding="ascii")) for file in Path(folder).glob("rank*")]


def _rank(rank: int, folder: str, case: Case, work: Any, given: float) -> None:
    torch.set_num_threads(1)
    give_back_freed()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=case.dp * case.ranks,
        timeout=timedelta(minutes=30),
    )
    group = lasp.SequenceGroup.from_mesh(lasp.init_mesh(dp=case.dp, sp=case.ranks, device="cpu"))
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
    training.step(case.tokens)
    most = status("VmHWM") - status("RssFile") - before
    keep_freed()
    pace = Pace()
    _, *looks = (pace.beside(lambda: training.step(case.tokens)) for _ in range(1 + int(repeat)))
    own = statistics.median(now for _, now in looks)
    seconds = own * statistics.median(step / now for step, now in looks)
    return {"bytes": most, "seconds": seconds, "pace": own}


def _attempt(case: Case, group: lasp.SequenceGroup, limit: float) -> int:
    """Steps under a limit on what the process may ask the system for."""
    most = status("VmData") + int(limit)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    training = Training(case, group)
    return len([training.step(case.tokens) for _ in range(WARM + 1)])


class Training:
    """Steps of a model over a group."""

    def __init__(self, case: Case, group: lasp.SequenceGroup) -> None:
        model = lasp.parallelize(case.plan.build(0, torch.float32), group, attention=METHOD, scan=SCAN)
        self.model: Any = pull(model, LEVERS[case.levers])
        self.module: Any = lasp.data_parallel(self.model, group, case.engine)  # type: ignore[arg-type]
        self.optimizers = build_optimizers(self.model, OptimizerConfig(name=case.optimizer))
        self.group, self.batches = group, case.batches

    def step(self, tokens: int) -> float:
        """Seconds of one over so many tokens of each rank in each batch, as `lasp train` makes it."""
        ids = torch.randint(64, (1, tokens * self.group.size), generator=torch.Generator().manual_seed(1))
        batch = lasp.shard_batch({"input_ids": ids, "labels": ids}, self.group)
        started = time.perf_counter()
        for left in reversed(range(self.batches)):
            with ExitStack() as stack:
                if left:
                    stack.enter_context(self.module.no_sync())  # ddp's: gradients travel with the last batch
                self.module(**batch, num_items_in_batch=self.batches * tokens * self.group.size).loss.backward()
        lasp.clip_grad_norm_(self.model, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - started
