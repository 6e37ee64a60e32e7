"""ShardedCollator: batches of a DataLoader, cut; and the samples that ranks do not share, refused by all."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, default_collate

import lasp
from lasp.models import LinearLlamaForCausalLM, LinearRobertaForMaskedLM
from lasp.parallel.batch import write_agreement
from tests.hf_models import make_single

pytestmark = pytest.mark.mpi
TEXTS = torch.arange(6 * 13).view(6, 13)
SAMPLES = [{"input_ids": ids.tolist(), "labels": ids} for ids in TEXTS]  # lists and tensors


def loader(collator: Callable, seed: int = 0, **options: Any) -> DataLoader:
    rng = torch.Generator().manual_seed(seed)
    return DataLoader(SAMPLES, batch_size=2, shuffle=True, generator=rng, collate_fn=collator, **options)


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_batches_of_a_loader_are_cut(group_of, layout: str, checks: bool) -> None:
    group = group_of(4, layout, checks)
    order = torch.cat([batch["input_ids"] for batch in loader(lasp.ShardedCollator(None))])
    assert sorted(order[:, 0].tolist()) == TEXTS[:, 0].tolist()
    batches = list(loader(lasp.ShardedCollator(group)))
    for whole, local in zip(order.split(2), batches, strict=True):
        expected = lasp.shard_batch({"input_ids": whole, "labels": whole}, group)
        assert local.pop("cut") == expected.pop("cut")
        assert local.keys() == expected.keys()
        assert all(torch.equal(local[name], expected[name]) for name in expected)


def test_a_collator_of_the_user_comes_first(group_of) -> None:
    group = group_of(2)
    if group is not None:
        pad = lasp.ShardedCollator(group, lambda samples: {"input_ids": torch.tensor(samples)}, shift=False)
        assert torch.equal(lasp.unshard(pad([[1, 2, 3]])["input_ids"], group), torch.tensor([[1, 2, 3]]))


def test_samples_that_differ_are_refused_by_all(world, group_of) -> None:
    group = group_of(4)
    with pytest.raises(ValueError, match="ranks disagree on input_ids of the batch, which all ranks"):
        next(iter(loader(lasp.ShardedCollator(group), seed=int(world.rank == 2))))


def test_a_batch_that_fails_on_one_rank_is_refused_by_all(world, group_of) -> None:
    collator = lasp.ShardedCollator(group_of(4), default_collate)
    good, ragged = {"input_ids": TEXTS[0]}, {"input_ids": TEXTS[0, :5]}
    with pytest.raises(ValueError, match=r"equal size.*\(rank 1 of 4\)"):
        collator([good, ragged if world.rank == 1 else good])
    with pytest.raises(ValueError, match=r"shard_batch knows .*; got pixels$"):
        collator([{"input_ids": TEXTS[0], "pixels": TEXTS[0]}])


def test_samples_of_unequal_length_are_packed_or_padded(group_of) -> None:
    samples = [{"input_ids": TEXTS[0]}, {"input_ids": TEXTS[1, :5]}]
    with pytest.raises(ValueError, match=r"^samples differ in length: pack \(lasp.PackingCollator\) or pad them"):
        lasp.ShardedCollator(group_of(4))(samples)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_packed_samples_are_cut(group_of, layout: str) -> None:
    group, packing = group_of(4, layout), lasp.PackingCollator(tokens=40)
    samples = [{"input_ids": TEXTS[i, : 9 + i]} for i in range(3)]
    local = lasp.ShardedCollator(group, packing)(samples)
    expected = lasp.shard_batch(packing(samples), None)
    assert local["cu_seqlens"].tolist() == [0, 9, 19, 30]
    for key in ("input_ids", "labels", "position_ids"):
        assert torch.equal(lasp.unshard(local[key], group), expected[key])


@pytest.fixture(scope="module")
def model(group_of) -> Any:
    """A tiny Llama, whose forward compares what batches from workers carry."""
    return lasp.parallelize(make_single("llama"), group_of(4))


WORKERS = [{"num_workers": 1}, {"num_workers": 2, "persistent_workers": True}]
SPAWNED = pytest.param(WORKERS[0] | {"multiprocessing_context": "spawn"}, marks=pytest.mark.slow)


@pytest.mark.parametrize("options", [*WORKERS, SPAWNED])
def test_workers_cut_and_the_model_compares(group_of, model, options: dict[str, Any]) -> None:
    collator = lasp.ShardedCollator(group_of(4))
    expected, batches = (DataLoader(SAMPLES, 2, collate_fn=collator, **kind) for kind in ({}, options))
    for _ in range(2):
        for whole, local in zip(expected, batches, strict=True):
            assert model(**local).loss == model(**whole).loss
            assert local.pop("agreement").dtype == torch.uint8
            assert whole.pop("cut").total == TEXTS.shape[1]
            assert local.keys() == whole.keys()
            assert all(torch.equal(local[key], whole[key]) for key in whole)


def test_what_workers_carry_is_compared_with_the_model_s_own_header(group_of, model) -> None:
    collator = lasp.ShardedCollator(group_of(4))
    control, data = [], []
    for options in ({}, WORKERS[0]):
        batch = next(iter(loader(collator, **options)))
        with lasp.traffic() as ledger:
            model(**batch)
        control.append(len(ledger.of("control")))
        data.append(ledger.of("forward"))
    assert control == [0, 2]  # a cut needs none; without one the lengths come first, and then the positions
    assert data[0] == data[1]


def test_workers_of_a_group_that_compares_nothing_carry_nothing(group_of) -> None:
    for group in (None, group_of(4, checks=False)):
        assert "agreement" not in next(iter(loader(lasp.ShardedCollator(group), num_workers=1)))


def test_samples_of_workers_that_differ_are_refused_by_all(world, group_of, model) -> None:
    batch = next(iter(loader(lasp.ShardedCollator(group_of(4)), seed=int(world.rank == 2), num_workers=1)))
    with pytest.raises(ValueError, match="ranks disagree on input_ids of the batch, which all ranks"):
        model(**batch)


@pytest.mark.parametrize("kind", ["key", "length", "crash"])
def test_a_mistake_in_one_rank_s_worker_is_told_by_all(world, group_of, model, kind: str) -> None:
    mistakes = {"key": {"pixels": [1]}, "length": {"labels": [1]}, "crash": {"input_ids": "text"}}
    samples = [SAMPLES[0] | (mistakes[kind] if world.rank == 1 else {})]
    batch = next(iter(DataLoader(samples, num_workers=1, collate_fn=lasp.ShardedCollator(group_of(4)))))
    with pytest.raises(ValueError, match=r"Error in a worker process: .*\(rank 1 of 4\)"):
        model(**batch)


def test_a_pickled_collator_has_no_group_and_cuts_alike(group_of) -> None:
    for layout in ("contiguous", "zigzag"):
        collator = lasp.ShardedCollator(group_of(4, layout), lasp.PackingCollator(99))
        copied = pickle.loads(pickle.dumps(collator))
        expected, local = collator(SAMPLES), copied(SAMPLES)
        assert expected.pop("cut").total == sum(len(sample["input_ids"]) for sample in SAMPLES)
        assert "agreement" in local
        assert "cut" not in local
        assert all(torch.equal(local[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("model_class", "shift"), [(LinearLlamaForCausalLM, True), (LinearRobertaForMaskedLM, False)])
def test_own_models_compare_too(world, group_of, model_class: Any, shift: bool) -> None:
    group = group_of(4)
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = model_class(model_class.config_class(**sizes, num_attention_heads=2))
    collator = lasp.ShardedCollator(group, shift=shift)
    whole, local = collator(SAMPLES[:2]), next(iter(DataLoader(SAMPLES, 2, num_workers=1, collate_fn=collator)))
    assert model(**local, group=group).loss == model(**whole, group=group).loss
    with pytest.raises(ValueError, match="cut in a worker process: give the model its group"):
        model(**local)
    local["agreement"] = write_agreement({}, "no" if world.rank == 3 else None)
    with pytest.raises(ValueError, match=r"no \(rank 3 of 4\)"):
        model(**local, group=group)
