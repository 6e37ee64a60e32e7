"""The Trainer of transformers over ranks: streams, worker processes and packed samples train as one process does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

import lasp

pytest.importorskip("accelerate")
import transformers

from lasp.train.sharded_trainer import ShardedTrainer
from tests.hf_models import make

pytestmark = pytest.mark.mpi
IDS = torch.randint(1, 97, (12, 21), generator=torch.Generator().manual_seed(0))
EQUAL = [{"input_ids": ids, "labels": ids} for ids in IDS]
UNEQUAL = [{"input_ids": ids[: 9 + i]} for i, ids in enumerate(IDS)]
LABELLED = [row | {"labels": row["input_ids"]} for row in UNEQUAL]


class Stream(IterableDataset):
    """Rows one after another, of unknown number."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


class Shards(Stream):
    """As a stream of `datasets`, which accelerate would deal out by its shards."""

    n_shards = 8


@contextmanager
def environment(**told: str) -> Iterator[None]:
    """What a launcher says, and nothing of mpirun's."""
    kept = dict(os.environ)
    for name in [name for name in kept if name.endswith(("WORLD_SIZE", "_RANK", "PMI_SIZE")) or name == "RANK"]:
        del os.environ[name]
    os.environ.update(told)
    try:
        yield
    finally:  # accelerate writes there too
        os.environ.clear()
        os.environ.update(kept)


def of_launcher(rank: int) -> Any:
    return environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="4", LOCAL_WORLD_SIZE="4")


def train(trainer_of: Callable[..., Any], model: Any, folder: Path, rows: Any, collator: Any, **own: Any) -> Any:
    options = transformers.TrainingArguments(
        str(folder), logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        learning_rate=0.01, max_steps=3, train_sampling_strategy="sequential", **own,
    )  # fmt: skip
    trainer = trainer_of(model=model, args=options, data_collator=collator, train_dataset=rows, eval_dataset=EQUAL[:4])
    trainer.train()
    trainer.evaluate()
    return trainer


def curve(trainer: Any) -> list[float]:
    logs = trainer.state.log_history
    weights = [p.double().norm().item() for p in trainer.model.parameters()]
    return [log[key] for log in logs for key in ("loss", "grad_norm", "eval_loss") if key in log] + weights


@pytest.fixture(scope="session")
def one_process(once, tmp_path_factory) -> Callable[[bool], list[float]]:
    """The curve of `Trainer` on one process: steps of four equal samples, or of four unequal ones, each by itself."""

    def run(equal: bool) -> list[float]:
        model = make("llama")  # the library's own loss is one in fp32
        model.loss_function = lambda logits, labels, num_items_in_batch, **_: lasp.cross_entropy(
            logits[:, :-1], labels[:, 1:], num_items=num_items_in_batch
        )
        rows = EQUAL if equal else LABELLED
        steps = {"per_device_train_batch_size": 4} if equal else {"gradient_accumulation_steps": 4}
        own = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 4} | steps
        with environment():
            return curve(train(transformers.Trainer, model, tmp_path_factory.mktemp("one"), rows, None, **own))

    return cache(lambda equal: once(run, equal))


FLAT = transformers.DataCollatorWithFlattening
CASES = {
    "rows": (EQUAL, None, {}),
    "workers": (EQUAL, None, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
    "stream": (Stream(EQUAL), None, {}),
    "shards and a worker": (Shards(EQUAL), None, {"dataloader_num_workers": 1}),
    "packed": (UNEQUAL, lasp.PackingCollator(tokens=84), {}),
    "flattened and a worker": (UNEQUAL, FLAT(return_flash_attn_kwargs=True), {"dataloader_num_workers": 1}),
    "flattened stream": (Stream(UNEQUAL), FLAT(), {}),
}


QUICK = ("rows", "stream", "flattened and a worker")


@pytest.mark.parametrize(
    ("case", "sp"),
    [
        *(pytest.param(case, 4, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES),
        ("packed", 2),
        *(pytest.param(case, 2, marks=pytest.mark.slow) for case in ("rows", "shards and a worker")),
    ],
)
def test_trains_as_one_process(world, mesh_of, one_process, tmp_path, case: str, sp: int) -> None:
    rows, collator, own = CASES[case]
    group = lasp.SequenceGroup.from_mesh(mesh_of(sp=sp))
    model = lasp.parallelize(make("llama"), group)
    sizes = {f"per_device_{kind}_batch_size": 4 * sp // world.size for kind in ("train", "eval")}
    expected = one_process(collator is None)
    with of_launcher(world.rank):
        trainer = train(partial(ShardedTrainer, group=group), model, tmp_path, rows, collator, **sizes, **own)
        assert trainer.get_total_train_batch_size(trainer.args) == 4
    assert curve(trainer) == pytest.approx(expected, rel=1e-6)


def refused(folder: Path, rank: int, match: str, rows: Any, **own: Any) -> None:
    group = lasp.SequenceGroup.from_mesh(lasp.init_mesh(sp=4, device="cpu"))
    model = lasp.parallelize(make("llama"), group)
    with of_launcher(rank), pytest.raises(ValueError, match=match):
        train(partial(ShardedTrainer, group=group), model, folder, rows, None, **own)


@pytest.mark.parametrize(
    ("match", "rows", "own"),
    [
        ("the batch has no labels: they are in the data set's rows, or", [{"input_ids": ids} for ids in IDS], {}),
        (r"samples differ in length: pack \(lasp.PackingCollator\) or pad", LABELLED, {}),
        ("Error in a worker process: samples differ in length", LABELLED, {"dataloader_num_workers": 1}),
    ],
)
def test_rows_that_make_no_batch_are_refused_by_all(
    world, own_groups, tmp_path, match: str, rows: Any, own: Any
) -> None:
    refused(tmp_path, world.rank, match, rows, per_device_train_batch_size=2, **own)


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_that_differ_are_refused_by_all(world, own_groups, tmp_path, workers: int) -> None:
    rows = EQUAL if world.rank != 2 else EQUAL[::-1]
    match = "ranks disagree on input_ids of the batch"
    refused(tmp_path, world.rank, match, rows, per_device_train_batch_size=2, dataloader_num_workers=workers)


@pytest.mark.parametrize(
    "own",
    [
        {"per_device_train_batch_size": 1},
        {"gradient_accumulation_steps": 2},
        {"dataloader_num_workers": 1},
        {"seed": 7},
    ],
)
def test_arguments_that_differ_are_refused_by_all(world, own_groups, tmp_path, own: dict[str, int]) -> None:
    (name,) = own
    shared = {"per_device_train_batch_size": 2}
    refused(tmp_path, world.rank, f"ranks disagree on {name}", EQUAL, **shared | (own if world.rank == 1 else {}))


def test_fsdp_is_refused(world, own_groups, tmp_path) -> None:
    refused(tmp_path, world.rank, "ShardedTrainer takes no fsdp", EQUAL, fsdp=True)
