"""ShardedCollator: batches of a DataLoader, cut; and the samples that ranks do not share, refused by all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, default_collate

import lasp

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
        assert local.keys() == expected.keys()
        assert all(torch.equal(local[name], expected[name]) for name in expected)


def test_a_collator_of_the_user_comes_first(group_of) -> None:
    group = group_of(2)
    if group is not None:
        pad = lasp.ShardedCollator(group, lambda samples: {"input_ids": torch.tensor(samples)}, shift=False)
        assert torch.equal(lasp.unshard(pad([[1, 2, 3]])["input_ids"], group), torch.tensor([[1, 2, 3]]))


def test_samples_that_differ_are_refused_by_all(world, group_of) -> None:
    group = group_of(4)
    with pytest.raises(ValueError, match="ranks disagree on samples, which all ranks of a sequence share: rank 0: "):
        next(iter(loader(lasp.ShardedCollator(group), seed=int(world.rank == 2))))


def test_a_batch_that_fails_on_one_rank_is_refused_by_all(world, group_of) -> None:
    collator = lasp.ShardedCollator(group_of(4), default_collate)
    good, ragged = {"input_ids": TEXTS[0]}, {"input_ids": TEXTS[0, :5]}
    with pytest.raises(ValueError, match=r"equal size.*\(rank 1 of 4\)"):
        collator([good, ragged if world.rank == 1 else good])
    with pytest.raises(ValueError, match=r"shard_batch knows .*; got pixels$"):
        collator([{"input_ids": TEXTS[0], "pixels": TEXTS[0]}])


def test_workers_are_refused(group_of) -> None:
    batches = loader(lasp.ShardedCollator(group_of(4)), num_workers=1)
    with pytest.raises(ValueError, match="num_workers=0"):
        next(iter(batches))
