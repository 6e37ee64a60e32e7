"""What four ranks tell of a step: bytes and operations as counted by hand, who is slow, and a trace with names."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mpi4py import MPI

from lasp.parallel.agreement import HEADER_BYTES
from lasp.train.config import DataConfig, TrainConfig
from lasp.train.loop import Trainer
from lasp.train.ranks import Ranks
from lasp.train.run import Run

pytestmark = [pytest.mark.mpi(min_size=4), pytest.mark.usefixtures("own_groups")]
MODEL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
    "pattern": "LN",
    "scan": "gather",
    "attention": "gather",
}
STATE, KEYS = 2 * 16 * 16 * 4, 32 * 2 * (16 + 16) * 4
"""Bytes of the memory that one rank tells another, and of keys and values of its 32 tokens."""


@pytest.fixture
def config(world: MPI.Comm, tmp_path: Path) -> TrainConfig:
    folder = Path(world.bcast(str(tmp_path)))
    if world.rank == 0:
        (folder / "text.txt").write_text("To be, or not to be, that is the question.\n" * 100)
    world.barrier()
    data = DataConfig(str(folder / "text.txt"), seq_len=64, packing="none", cache=str(folder))
    return TrainConfig(output=str(folder / "run"), device="cpu", sp=2, steps=9, model=MODEL, data=data, profile="2:2")


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_four_ranks_tell_what_a_step_took(config, world, monkeypatch, engine):
    config = replace(config, engine=engine, output=f"{config.output}-{engine}")
    monkeypatch.setattr("lasp.train.meter.peak_flops", lambda *_: 1e12)
    ranks = Ranks.join(config)
    trainer = Trainer.start(Run.prepare_together(config, ranks.everyone), ranks)
    if world.rank == 2:
        read = trainer.source.read
        slow = 0.5  # seconds: more than other work on the machine holds up the others
        object.__setattr__(trainer.source, "read", lambda step: (time.sleep(slow), read(step))[1])
    trainer.step()
    trainer.meter.totals(1)
    trainer.step()
    found = trainer.meter.totals(2)
    matrices = (5 + 4) * 32 * 32 + 2 * 3 * 32 * 64 + 257 * 32
    layers, rest = (5 + 4) * 32 * 32 + 2 * 3 * 32 * 64 + 4 * 32 + 16, 257 * 32 + 32
    sent = 2 * (layers + rest)  # ddp: an all-reduce of all
    if engine == "fsdp2":  # layers are gathered twice, the rest once, and all are scattered
        sent = 3 * layers + 2 * rest
    expected = 3 / 4 * 4 * sent + 2 * STATE + 2 * KEYS + HEADER_BYTES
    assert found["received"] == pytest.approx(expected, rel=0.01)
    linear, softmax = 4 * 2 * 16 * 16, 2 * (16 + 16) * 2 * 65 / 2
    flops = 2 * 64 * (6 * matrices + 3 * (linear + softmax))
    assert found["flops_per_second"] * 4 * found["seconds"] == pytest.approx(flops)
    assert found["tokens"] == 2 * 128
    assert found["slowest_rank"] == 2
    assert found["slowest_by"] > 0.1
    assert 0.5 <= found["data"] <= found["seconds"]
    assert found["waited"] > 0.1
    trace = Path(config.output) / "profile" / f"steps-2-2-rank-{world.rank}.json"
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    sent = ["all_reduce gradients"] if engine == "ddp" else ["all_gather parameters", "reduce_scatter gradients"]
    stages = ["chunk_states", "read_out", "adjoint_states", "softmax block", "softmax block gradients"]
    scans = [f"scan gather {phase} {what}" for phase in ("forward", "backward") for what in ("starts", "arrives")]
    others = ["step 2", "all_gather forward", "reduce_scatter backward"]
    assert {f"lasp::{name}" for name in (*sent, *stages, *scans, *others)} <= names
