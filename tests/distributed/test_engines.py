"""Every engine on 2 x 2 ranks, with two micro-batches a step, has the curve of one process."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch.distributed.tensor import DTensor

from lasp.parallel.group import SequenceGroup
from lasp.train.checkpoints.checkpointer import Folders
from lasp.train.checkpoints.export import read_weights
from lasp.train.checkpoints.folders import checkpoint_path
from lasp.train.checkpoints.manifest import Manifest
from lasp.train.config import DataConfig, LoraConfig, MemoryConfig, OptimizerConfig, TrainConfig
from lasp.train.engines import start_engine
from lasp.train.loop import Trainer, train
from lasp.train.ranks import Ranks
from lasp.train.run import Run
from tests.hf_models import configuration

pytestmark = [pytest.mark.mpi(min_size=4), pytest.mark.timeout(240)]
has_deepspeed = importlib.util.find_spec("deepspeed") is not None
zero = pytest.mark.skipif(not has_deepspeed, reason="needs the extra deepspeed")
ZERO = [pytest.param(f"zero{stage}", marks=[zero, pytest.mark.slow]) for stage in (1, 2, 3)]
ENGINES = ["ddp", "fsdp2", *ZERO]
HYBRID = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "pattern": ["gated_deltanet", "softmax"],
    "tie_word_embeddings": True,
}
LEVERS = MemoryConfig(fuse_loss=True, mlp_tile=8, checkpoint_every=1)


@pytest.fixture
def config(world: MPI.Comm, tmp_path: Path) -> TrainConfig:
    """Two micro-batches a step of packed documents, with every lever on memory."""
    folder = Path(world.bcast(str(tmp_path)))
    if world.rank == 0:
        verse = "To be, or not to be, that is the question.\n" * 3
        rows = [json.dumps({"text": verse[: 5 + 17 * row % 90]}) for row in range(100)]
        (folder / "text.jsonl").write_text("\n".join(rows))
    world.barrier()
    return TrainConfig(
        output=str(folder / "run"),
        device="cpu",
        steps=10,
        sp=2,
        accumulation=2,
        model=HYBRID,
        memory=LEVERS,
        data=DataConfig(
            str(folder / "text.jsonl"), tokenizer="bytes", packing="first_fit", seq_len=37, cache=str(folder)
        ),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2),
    )


class Alone(Ranks):
    """Rank 0 as the only one: what it computes, the others are told."""

    is_main, dp_rank, dp_size, device = True, 0, 1, torch.device("cpu")

    @classmethod
    def make(cls, subgroups: dict[int, Any]) -> Alone:
        group = SequenceGroup.from_group(subgroups[1])
        return cls(None, group, group)


def curve_of_one_process(config: TrainConfig, subgroups: dict[int, Any]) -> list[float]:
    data = replace(config.data, batch_size=4)
    whole = replace(config, engine="ddp", sp=1, tp=1, accumulation=1, memory=MemoryConfig(), data=data)
    ranks, run = Alone.make(subgroups), Run.prepare(whole)
    engine = start_engine(run.build_model(ranks), whole, ranks)
    trainer = Trainer(run, ranks, run.open_source(ranks), engine, Folders(run, ranks))
    return [trainer.step().loss for _ in range(whole.steps)]


def foreign(config: TrainConfig, world: MPI.Comm, kind: str) -> TrainConfig:
    """The same run of a tiny model of transformers from its configuration."""
    folder = Path(config.output).with_name(kind)
    if world.rank == 0:
        configuration(kind).save_pretrained(folder)
    world.barrier()
    return replace(config, model={"name": str(folder), "from_scratch": True, "vocab_size": 300})


def local_rank(world: MPI.Comm) -> str:
    """What DeepSpeed looks for, as mpirun has numbered the ranks of a machine, which is in an order of its own."""
    return os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", str(world.rank))


@pytest.fixture
def groups(engine: str, world: MPI.Comm, request: pytest.FixtureRequest) -> None:
    """Process groups end with a test, but for those that DeepSpeed makes and keeps."""
    if engine.startswith("zero"):
        request.getfixturevalue("monkeypatch").setenv("LOCAL_RANK", local_rank(world))
    else:
        request.getfixturevalue("own_groups")


@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.slow), *ENGINES[1:]])
@pytest.mark.usefixtures("groups")
def test_the_curve_is_that_of_one_process_also_after_a_resume(config, once, subgroups, engine):
    compare_with_one_process(replace(config, engine=engine), once, subgroups)


def sharing_heads(config: TrainConfig) -> TrainConfig:
    """The same batches on dp x sp x tp = 1 x 2 x 2."""
    return replace(config, tp=2, data=replace(config.data, batch_size=2))


@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
@pytest.mark.usefixtures("own_groups")
def test_the_curve_over_shared_heads_is_that_of_one_process_also_after_a_resume(config, once, subgroups, engine):
    compare_with_one_process(sharing_heads(replace(config, engine=engine)), once, subgroups)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("kind", "rank"), [("qwen3_next", 4), ("bamba", 0)])
@pytest.mark.usefixtures("groups")
def test_the_curve_of_a_foreign_hybrid_is_that_of_one_process(config, world, once, subgroups, kind, rank, engine):
    """Adapters of peft around experts and gated delta rules; all of a hybrid of Mamba-2."""
    config = replace(foreign(config, world, kind), engine=engine, lora=LoraConfig(rank=rank))
    compare_with_one_process(config, once, subgroups, fall=0.1)


def compare_with_one_process(config, once, subgroups, fall=1.0):
    expected = once(curve_of_one_process, config, subgroups)
    config = replace(config, save_every=6, async_save=config.engine == "fsdp2")
    ranks = Ranks.join(config)
    summary = train(Run.prepare_together(config, ranks.everyone), ranks)
    assert summary.losses == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0] - fall
    other, sp = {"ddp": ("fsdp2", 4), "fsdp2": ("ddp", 1)}.get(config.engine, (config.engine, 2))
    again = replace(config, output=config.output + "-again", resume=str(checkpoint_path(config.output, 6)))
    again = replace(again, engine=other, sp=sp, tp=1, accumulation=sp, data=replace(config.data, batch_size=1))
    ranks = Ranks.join(again)
    resumed = train(Run.prepare_together(again, ranks.everyone), ranks)
    assert resumed.losses == pytest.approx(summary.losses[6:], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=zero)])
@pytest.mark.usefixtures("groups")
def test_what_2_x_2_ranks_saved_goes_on_on_any_ranks_and_engine(config, once, subgroups, engine):
    config = replace(config, engine=engine, save_every=6)
    ranks = Ranks.join(config)
    whole = train(Run.prepare_together(config, ranks.everyone), ranks)
    path = str(checkpoint_path(config.output, 6))
    for other, sp in (("ddp", 4), ("fsdp2", 1), ("fsdp2", 2), *([("zero1", 2), ("zero3", 4)] if has_deepspeed else [])):
        again = replace(config, output=f"{config.output}-{other}-{sp}", resume=path, engine=other, sp=sp)
        again = replace(again, accumulation=sp)
        ranks = Ranks.join(again)
        resumed = train(Run.prepare_together(again, ranks.everyone), ranks)
        assert resumed.losses == pytest.approx(whole.losses[6:], rel=1e-5), (other, sp)
    assert once(resumed_alone, config, subgroups, path) == pytest.approx(whole.losses[6:], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engines", [("fsdp2", "ddp", "fsdp2"), pytest.param(("fsdp2", "ddp", "zero3", "ddp"), marks=zero)], ids="-".join
)
def test_a_run_that_changes_its_engine_on_the_way_is_the_undisturbed_one(config, world, monkeypatch, engines):
    """Two steps with each, told to stop after the second, in one folder."""
    monkeypatch.setenv("LOCAL_RANK", local_rank(world))
    whole, losses = replace(config, steps=12, output=config.output + "-whole"), []
    ranks = Ranks.join(whole)
    expected = train(Run.prepare_together(whole, ranks.everyone), ranks).losses
    for engine in engines:
        part = replace(config, steps=12, engine=engine, resume="latest")
        ranks = Ranks.join(part)
        losses += train(Run.prepare_together(part, ranks.everyone), ranks, stop=iter([False, True]).__next__).losses
    assert losses == pytest.approx(expected[: len(losses)], rel=1e-5)
    assert len(losses) == 2 * len(engines)


def resumed_alone(config: TrainConfig, subgroups: dict[int, Any], path: str) -> list[float]:
    data = replace(config.data, batch_size=4)
    whole = replace(config, sp=1, accumulation=1, data=data, engine="ddp", resume=path, output=config.output + "-alone")
    ranks, run = Alone.make(subgroups), Run.prepare(whole)
    engine, folders = start_engine(run.build_model(ranks), whole, ranks), Folders(run, ranks)
    done = folders.load(run.checkpoint, engine)
    trainer = Trainer(run, ranks, run.open_source(ranks), engine, folders, done)
    return [trainer.step().loss for _ in range(whole.steps - done)]


@pytest.mark.usefixtures("own_groups")
def test_a_rank_that_cannot_write_ends_the_run_on_all_and_without_a_shared_folder_one_writes(
    config, world, monkeypatch
):
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device", "rank-2.safetensors")

    ranks = Ranks.join(replace(config, engine="fsdp2"))
    trainer = Trainer.start(Run.prepare_together(replace(config, engine="fsdp2"), ranks.everyone), ranks)
    trainer.checkpoints.save(1, trainer.engine, False, trainer.kept)
    with monkeypatch.context() as patch:
        if world.rank == 2:
            patch.setattr("lasp.train.checkpoints.writer.save_file", full_disk)
        with pytest.raises(OSError, match=r"cannot save '.*step-000002': .*No space left on device.*\(rank 2\)"):
            trainer.checkpoints.save(2, trainer.engine, False, trainer.kept)
    folder = checkpoint_path(config.output, 1).parent
    world.barrier()
    assert os.listdir(folder) == ["step-000001"]
    world.barrier()  # every rank has looked before the next save begins
    if world.rank:  # as on machines that share no folder
        elsewhere = replace(trainer.run.config, output=config.output + "-elsewhere")
        trainer.checkpoints.run = replace(trainer.run, config=elsewhere)
    trainer.checkpoints.save(3, trainer.engine, False, trainer.kept)
    one, two = (Manifest.read(folder / name).check() for name in ("step-000001", "step-000003"))
    assert [sum("rank" in name for name in manifest.files) for manifest in (one, two)] == [4, 1]
    assert all(torch.equal(value, read_weights(two)[name]) for name, value in read_weights(one).items())


LARGE = {**HYBRID, "hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 8192}


@pytest.fixture
def large_tensors() -> Iterator[None]:
    """Freed memory goes back to the system at once, as that of tensors of more than 32 MB always does."""
    threshold, library = -3, ctypes.CDLL(None)
    library.mallopt(threshold, 1 << 16)
    yield
    library.mallopt(threshold, 1 << 25)


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=[zero, pytest.mark.slow])])
@pytest.mark.usefixtures("groups", "large_tensors")
def test_ranks_make_a_model_as_one_would_in_the_memory_of_little_more_than_one(config, world, engine):
    """The same weights and buffers; DeepSpeed has large buffers of its own, which are not measured."""
    ranks = Ranks.join(replace(config, engine=engine))
    for model in (HYBRID, LARGE):  # the first one imports things
        config = replace(config, engine=engine, model=model)
        run = Run.prepare_together(config, ranks.everyone)
        pids = world.allgather(os.getpid())
        with Peak(pids if world.rank == 0 else []) as peak:
            started = start_engine(run.build_model(ranks), config, ranks)
            world.barrier()
    expected = run.model.build(config.seed, torch.float32)
    size = sum(parameter.nbytes for parameter in expected.parameters())
    assert engine == "zero3" or world.bcast((peak.most - peak.first) / size) < 1.7
    buffers = dict(expected.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in started.model.named_buffers())
    with nullcontext() if engine == "fsdp2" else started._gathered():
        found = dict(started.model.named_parameters())
        for name, value in expected.named_parameters():
            assert torch.equal(found[name].full_tensor() if engine == "fsdp2" else found[name], value), name


class Peak(threading.Thread):
    """What some processes hold together, in bytes of anonymous memory, at first and at most, looked at every 2 ms."""

    def __init__(self, pids: list[int]) -> None:
        super().__init__(daemon=True)
        self.pids, self.over = pids, threading.Event()
        self.first = self.most = self.held()

    def held(self) -> int:
        files = [Path(f"/proc/{pid}/status").read_text() for pid in self.pids]
        return sum(int(text.partition("RssAnon:")[2].split()[0]) * 1024 for text in files)

    def run(self) -> None:
        while not self.over.wait(0.002):
            self.most = max(self.most, self.held())

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=[zero, pytest.mark.slow])])
@pytest.mark.usefixtures("groups")
def test_a_rank_holds_its_share_of_parameters_and_optimizer_state(config, engine):
    config = replace(config, engine=engine)
    ranks = Ranks.join(config)
    trainer = Trainer.start(Run.prepare_together(config, ranks.everyone), ranks)
    trainer.step()
    parameters = list(trainer.engine.model.parameters())
    if engine == "fsdp2":
        held = sum(parameter.to_local().numel() for parameter in parameters)
        whole = sum(parameter.numel() for parameter in parameters)
        kept = [value for o in trainer.engine.optimizers for state in o.state.values() for value in state.values()]
        moments = sum(value.to_local().numel() for value in kept if isinstance(value, DTensor))
    else:
        held = sum(parameter.ds_tensor.numel() for parameter in parameters)
        whole = sum(parameter.ds_numel for parameter in parameters)
        states = trainer.engine.deepspeed.optimizer.optimizer.state.values()
        moments = sum(value.numel() for state in states for value in state.values() if value.dim())
    assert 0 < held < 0.27 * whole
    assert 0 < moments < 2 * 0.27 * whole
