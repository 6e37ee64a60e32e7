"""Cutting and joining tensors and batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lasp

pytestmark = pytest.mark.mpi
LAYOUTS = ["contiguous", "zigzag"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [4, 9, 16, 37])
@pytest.mark.parametrize("dim", [0, 1, -2])
def test_unshard_undoes_shard(group_of, layout: str, length: int, dim: int) -> None:
    group = group_of(4, layout=layout)
    shape = [3, 3, 2]
    shape[dim] = length
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    part = lasp.shard(x, group, dim)
    assert abs(part.shape[dim] - length / 4) < 2
    assert torch.equal(lasp.unshard(part, group, dim), x)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.bool, torch.float8_e5m2], ids=str)
def test_any_dtype_travels(group_of, dtype: torch.dtype) -> None:
    group, x = group_of(4), torch.arange(9).view(1, 9).to(dtype)
    assert torch.equal(lasp.unshard(lasp.shard(x, group), group).float(), x.float())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_follow_the_convention(world, group_of, layout: str) -> None:
    """shard backward is this rank's part of a sum over ranks; unshard backward is the sum over the ranks."""
    group = group_of(4, layout=layout)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 13, dtype=torch.float64, generator=rng, requires_grad=True)
    weights = torch.randn(4, 2, 13, dtype=torch.float64, generator=rng)
    part = lasp.shard(x, group)
    part.retain_grad()
    with lasp.traffic() as ledger:
        (lasp.unshard(part, group) * weights[world.rank]).sum().backward()
    torch.testing.assert_close(part.grad, lasp.shard(weights.sum(0), group), rtol=0, atol=1e-14)
    assert torch.equal(lasp.shard(x.grad, group), part.grad)
    assert x.grad.count_nonzero() == part.grad.count_nonzero()
    assert [r.op for r in ledger.of("forward")] == ["all_gather"]
    assert [r.op for r in ledger.of("backward")] == ["reduce_scatter"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_are_shifted_before_they_are_cut(group_of, layout: str) -> None:
    group = group_of(4, layout=layout)
    ids = torch.arange(100, 126).view(2, 13)
    local = lasp.shard_batch({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}, group)
    cut = local.pop("cut")
    assert cut.total == 13
    whole = {name: lasp.unshard(x, cut=cut) for name, x in local.items()}
    assert torch.equal(whole["input_ids"], ids)
    assert torch.equal(whole["shift_labels"][:, :-1], ids[:, 1:])
    assert (whole["shift_labels"][:, -1] == -100).all()
    assert torch.equal(whole["labels"], whole["shift_labels"])
    assert torch.equal(whole["position_ids"], torch.arange(13).unsqueeze(0))
    assert torch.equal(
        lasp.unshard(lasp.shard_batch({"input_ids": ids, "labels": ids}, group, shift=False)["labels"], group), ids
    )


def test_packed_batches_restart_positions_and_lose_no_target(group_of) -> None:
    group, bounds = group_of(4), torch.tensor([0, 4, 4, 5, 13])
    ids = torch.arange(100, 113).unsqueeze(0)
    local = lasp.shard_batch({"input_ids": ids, "labels": ids, "cu_seqlens": bounds}, group)
    assert torch.equal(local["cu_seqlens"], bounds)
    assert lasp.unshard(local["position_ids"], group).tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5, 6, 7]]
    expected = [101, 102, 103, -100, -100, 106, 107, 108, 109, 110, 111, 112, -100]
    assert lasp.unshard(local["shift_labels"], group).tolist() == [expected]


def test_slices_name_the_tokens_of_a_rank(world, group_of) -> None:
    contiguous = [[slice(0, 4)], [slice(4, 7)], [slice(7, 10)], [slice(10, 13)]]
    zigzag = [
        [slice(0, 2), slice(12, 13)],
        [slice(2, 4), slice(11, 12)],
        [slice(4, 6), slice(10, 11)],
        [slice(6, 8), slice(8, 10)],
    ]
    assert group_of(4).slices(13) == contiguous[world.rank]
    assert group_of(4, layout="zigzag").slices(13) == zigzag[world.rank]


IDS = torch.arange(26).view(2, 13)
MASK = torch.ones(2, 13)


def batch_with(**changes: Any) -> dict[str, Any]:
    batch = {"input_ids": IDS, "labels": IDS.clone(), "attention_mask": MASK} | changes
    return {key: value for key, value in batch.items() if value is not None}


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("input_ids", {"input_ids": IDS.flip(0)}),
        ("input_ids", {"input_ids": IDS + (IDS == 25)}),
        ("input_ids", {key: x[:1] for key, x in batch_with().items()}),
        ("labels", {"labels": IDS.masked_fill(IDS < 5, -100)}),
        ("labels", {"labels": None}),
        ("attention_mask", {"attention_mask": MASK.bool()}),
        ("attention_mask", {"attention_mask": MASK.masked_fill(IDS == 0, 0)}),
        ("position_ids", {"position_ids": torch.arange(13).expand(2, 13)}),
    ],
)
def test_ranks_that_hold_different_batches_are_refused(world, group_of, rank: int, key: str, changes: Any) -> None:
    group = group_of(4)
    with pytest.raises(ValueError, match=f"ranks disagree on {key} of the batch, which all ranks of a sequence share"):
        lasp.shard_batch(batch_with(**changes) if world.rank == rank else batch_with(), group)
    lasp.shard_batch(batch_with(), group)  # and the group goes on


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("got pixels", {"pixels": IDS}),
        (r"input_ids must be \[B, N\], got shape \[13\]", {"input_ids": IDS[0]}),
        ("labels must be integers", {"labels": IDS.float()}),
        ("needs input_ids or inputs_embeds", {"input_ids": None}),
        ("3 tokens cannot be cut over 4 ranks", {key: x[:, :3] for key, x in batch_with().items()}),
        ("cannot be made one", {"labels": object()}),
    ],
)
def test_a_mistake_of_one_rank_is_told_by_all(world, group_of, match: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{match}.*\(rank 2 of 4\)"):
        lasp.shard_batch(batch_with(**changes) if world.rank == 2 else batch_with(), group_of(4))


@pytest.mark.parametrize(("checks", "exchanges"), [(True, 1), (False, 0)])
def test_a_batch_is_agreed_once_and_without_checks_not_at_all(group_of, checks: bool, exchanges: int) -> None:
    group = group_of(4, "zigzag", checks)
    collator = lasp.ShardedCollator(group)
    for make in (lambda: lasp.shard_batch(batch_with(), group), lambda: collator([{"input_ids": IDS[0]}])):
        with lasp.traffic() as ledger:
            make()
        assert [record.phase for record in ledger.records] == ["control"] * exchanges


def test_documents_packed_by_transformers_are_cut(group_of) -> None:
    group, ids = group_of(4), torch.arange(8).view(1, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    local = lasp.shard_batch({"input_ids": ids, "position_ids": positions, "labels": ids}, group)
    assert local["cu_seqlens"].tolist() == [0, 3, 5, 8]
    assert torch.equal(lasp.unshard(local["position_ids"], group), positions)
    assert lasp.unshard(local["labels"], group).tolist() == [[1, 2, -100, 4, -100, 6, 7, -100]]
