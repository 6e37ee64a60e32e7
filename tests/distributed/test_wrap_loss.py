"""The loss of a wrapped model: in evaluation, with accumulation, and on ranks that have no labels."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lasp
from tests.hf_models import make

pytestmark = pytest.mark.mpi
IDS = torch.randint(97, (4, 29), generator=torch.Generator().manual_seed(0))
LABELS = IDS.clone()
LABELS[:2, :21] = -100  # in the contiguous layout, the first ranks of both worlds have nothing to predict
LABELS[3, 3:9] = -100


def loss_sum(model: Any, rows: slice) -> Tensor:
    """One process: the sum over valid targets, in fp64."""
    logits = model(IDS[rows], use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), LABELS[rows, 1:].flatten(), reduction="sum")


def count(rows: slice) -> int:
    return int((LABELS[rows, 1:] != -100).sum())


def batch(rows: slice, group: lasp.SequenceGroup) -> dict[str, Any]:
    return lasp.shard_batch({"input_ids": IDS[rows], "labels": LABELS[rows]}, group)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("size", [2, 4])
def test_evaluation_gives_the_true_loss_on_every_rank(world, group_of, size: int, layout: str) -> None:
    group = group_of(size, layout)
    if group is None:
        return
    model, rows = make("qwen3_5").eval(), slice(0, 2)
    own = lasp.parallelize(copy.deepcopy(model), group)
    with torch.no_grad():
        expected = (loss_sum(model, rows) / count(rows)).item()
        local = batch(rows, group)
        assert layout == "zigzag" or group.rank or (local["labels"] == -100).all()
        loss = own(**local).loss
    assert loss.item() == pytest.approx(expected, abs=1e-10)
    assert lasp.unshard(loss.reshape(1), group, 0).unique().numel() == 1


def test_what_one_rank_does_otherwise_is_an_error_on_all(world, group_of) -> None:
    group = group_of(4)
    own, whole = lasp.parallelize(make("qwen3_moe"), group), batch(slice(0, 2), group)
    del whole["cut"]  # or the ranks would agree on nothing more
    flag = {"output_router_logits": True} if group.rank == 1 else {}
    with pytest.raises(ValueError, match=r"ranks disagree on arguments.*output_router_logits"):
        own(**whole, **flag)
    empty = whole["input_ids"][:, : 0 if group.rank == 2 else None]
    with pytest.raises(ValueError, match=r"every rank needs a token, the ranks hold \[8, 7, 0, 7\]"):
        own(empty)


@pytest.mark.parametrize("size", [2, 4])
def test_accumulated_steps_weigh_every_target_alike(group_of, size: int) -> None:
    """Two steps with unequal numbers of targets, in the first of which a rank has none: one process, one batch."""
    group = group_of(size)
    if group is None:
        return
    model, steps, rows = make("qwen3_5"), (slice(0, 2), slice(2, 4)), slice(0, 4)
    own = lasp.parallelize(copy.deepcopy(model), group)
    expected = loss_sum(model, rows) / count(rows)
    expected.backward()
    total = 0.0
    for step in steps:
        loss = own(**batch(step, group), num_items_in_batch=torch.tensor(count(rows))).loss
        assert math.isfinite(loss.item())
        loss.backward()
        total += loss.item()
    lasp.sync_gradients(own, group)
    assert total == pytest.approx(expected.item(), abs=1e-10)
    for one, two in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=0, atol=1e-9)
