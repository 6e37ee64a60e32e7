"""Mistakes of a user: the same ValueError on every rank, whether one rank makes them or all, and no hang."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

import lasp
from lasp.parallel.scan import ScanName

pytestmark = pytest.mark.mpi

WRONG_RANK = 2
TOKENS = 6


def good(rank: int) -> dict[str, Any]:
    """Arguments of a call that works: six tokens on every rank."""
    rng = torch.Generator().manual_seed(rank)
    q, k, v = (torch.randn(1, TOKENS, 2, 4, generator=rng, dtype=torch.float64) for _ in range(3))
    return {"q": q, "k": k, "v": v, "log_decay": -torch.rand(1, TOKENS, 2, dtype=torch.float64)}


# name: (what it does to good arguments, what the message says)
MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "growing": (lambda a: {"log_decay": a["log_decay"] + 0.75}, "log_decay must be <= 0, got a maximum of 0."),
    "nan": (lambda a: {"log_decay": a["log_decay"] * float("nan")}, "log_decay must be <= 0, got a maximum of nan"),
    "tokens": (lambda a: {"k": a["k"][:, :5]}, "must share batch and tokens, got q [1, 6, 2, 4], k [1, 5, 2, 4]"),
    "key dim": (lambda a: {"k": a["k"][..., :3]}, "q and k must share their last dim"),
    "rank of tensor": (lambda a: {"v": a["v"][0]}, "q, k, v must be [batch, tokens, heads, dim]"),
    "dtypes": (lambda a: {"k": a["k"].float()}, "must share a floating dtype, got torch.float64, torch.float32"),
    "integers": (lambda a: {n: a[n].long() for n in "qkv"}, "must share a floating dtype, got torch.int64"),
    "heads": (lambda a: {"q": a["q"].repeat(1, 1, 2, 1)[:, :, :3]}, "numbers of heads must divide one another"),
    "decay shape": (lambda a: {"log_decay": a["log_decay"][0]}, "log_decay must be [H], [B, T, H] or [B, T, H, K]"),
    "decay tokens": (lambda a: {"log_decay": a["log_decay"][:, :2]}, "must share batch and tokens with q"),
    "decay without mask": (lambda a: {"causal": False}, "causal=False takes no log_decay"),
    "state shape": (lambda a: {"initial_state": a["q"][0]}, "initial_state must be [B, H, K, V] = [1, H, 4, 4]"),
    "bounds": (lambda a: {"cu_seqlens": [0, 9, 7, 24]}, "cu_seqlens must never decrease, got 9 followed by 7"),
    "bounds begin": (lambda a: {"cu_seqlens": [1, 24]}, "cu_seqlens must begin with 0"),
    "scan": (lambda a: {"scan": "star"}, f"scan must be one of {', '.join(get_args(ScanName))}, got 'star'"),
    "backend": (lambda a: {"backend": "abacus"}, "backend must be one of auto, torch, triton, fla, got 'abacus'"),
    "chunk size": (lambda a: {"chunk_size": 0}, "chunk_size must be a whole number of at least 1, got 0"),
    "chunk of a float": (lambda a: {"chunk_size": 8.0}, "chunk_size must be a whole number of at least 1, got 8.0"),
    "scale": (lambda a: {"scale": float("nan")}, "scale must be a finite number, got nan"),
    "scale of text": (lambda a: {"scale": "x"}, "scale must be a finite number, got 'x'"),
    "state of integers": (
        lambda a: {"initial_state": a["q"].long()},
        "initial_state must be floating and on the device",
    ),
    "not a tensor": (lambda a: {"q": None}, "q must be a tensor, got None"),
}

# Fine on each rank alone, wrong together: (what rank WRONG_RANK does, what the message says)
DISAGREEMENTS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "dtype": (lambda a: {n: x.float() for n, x in a.items()}, "ranks disagree on dtype: rank 0: torch.float64"),
    "heads": (lambda a: {n: x[:, :, :1] for n, x in a.items()}, "ranks disagree on heads"),
    "value dim": (
        lambda a: {"v": a["v"][..., :2]},
        "ranks disagree on dims: rank 0: [4, 4], rank 1: [4, 4], rank 2: [4, 2]",
    ),
    "kind of decay": (lambda a: {"log_decay": None}, "ranks disagree on"),
    "scan": (lambda a: {"scan": "ring"}, "ranks disagree on scan: rank 0: auto"),
    "scale": (lambda a: {"scale": 2.0}, "ranks disagree on scale: rank 0: 0.5"),
    "mask": (lambda a: {"causal": False, "log_decay": None}, "ranks disagree on causal"),
    "documents": (lambda a: {"cu_seqlens": [0, 24]}, "ranks disagree on cu_seqlens"),
    "final state": (lambda a: {"output_final_state": True}, "ranks disagree on final_state"),
    "device": (lambda a: {n: x.to("meta") for n, x in a.items()}, "ranks disagree on device: rank 0: cpu, rank 1: cpu"),
    "gradients": (lambda a: {"q": a["q"].clone().requires_grad_()}, "ranks disagree on backward"),
}


def told(world, group: lasp.SequenceGroup, arguments: dict[str, Any]) -> str:
    """The message of the ValueError that the call raises, which must be the same on every rank."""
    with pytest.raises(ValueError) as caught:
        lasp.linear_attention(group=group, **arguments)
    messages = world.allgather(str(caught.value))
    assert len(set(messages)) == 1, messages
    return messages[0]


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_mistake_of_one_rank_or_of_all(world, group_of, name: str, layout: str) -> None:
    group, (spoil, message) = group_of(4, layout=layout), MISTAKES[name]
    arguments = good(world.rank)
    spoiled = arguments | spoil(arguments)
    assert message in told(world, group, spoiled)
    one = told(world, group, spoiled if world.rank == WRONG_RANK else arguments)
    assert message in one
    assert f"(rank {WRONG_RANK} of 4)" in one
    # The group still works.
    assert lasp.linear_attention(group=group, **arguments).isfinite().all()


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_disagree(world, group_of, name: str) -> None:
    group, (change, message) = group_of(4), DISAGREEMENTS[name]
    arguments = good(world.rank)
    changed = arguments | (change(arguments) if world.rank == WRONG_RANK else {})
    assert message in told(world, group, changed)
    assert lasp.linear_attention(group=group, **arguments).isfinite().all()


def test_what_only_looks_different_is_taken(world, group_of) -> None:
    group, arguments, wrong = group_of(4), good(world.rank), world.rank == WRONG_RANK
    q, k, v = (arguments[name] for name in "qkv")
    for call in (lasp.linear_attention, lasp.softmax_attention):
        assert call(q, k, v, scale=0.5 if wrong else None, group=group).isfinite().all()
    assert lasp.unshard(v, group, dim=1 if wrong else -3).shape == (1, 24, 2, 4)


def test_delta_product_tells_the_others(world, group_of) -> None:
    """What is no tensor is met before the steps of a token are laid out."""
    group, wrong = group_of(4), world.rank == WRONG_RANK
    q = torch.randn(1, 6, 2, 4)
    k = torch.nn.functional.normalize(torch.randn(1, 6, 2, 2, 4), dim=-1)
    beta = torch.ones(1, 6, 2, 2)
    for spoiled in ({"q": None}, {"k": None}, {"v": k[:, :, :1]}, {"beta": beta[0]}):
        arguments = {"q": q, "k": k, "v": k, "beta": beta} | (spoiled if wrong else {})
        with pytest.raises(ValueError) as caught:
            lasp.functional.delta_product(**arguments, group=group)
        messages = world.allgather(str(caught.value))
        assert len(set(messages)) == 1
        assert "(rank 2 of 4)" in messages[0]
    assert lasp.functional.delta_product(q, k, k, beta, group=group).isfinite().all()


def test_bounds_must_end_at_the_whole_length(world, group_of) -> None:
    arguments = good(world.rank) | {"cu_seqlens": [0, 5, 23]}
    assert "must end at the whole sequence's length 24, got 23" in told(world, group_of(4), arguments)


def test_packed_documents_need_one_sequence(world, group_of) -> None:
    arguments = {name: x.repeat(2, 1, 1, *[1] * (x.dim() - 3)) for name, x in good(world.rank).items()}
    assert "needs B = 1, got B = 2" in told(world, group_of(4), arguments | {"cu_seqlens": [0, 24]})


def test_fewer_tokens_than_ranks(world, group_of) -> None:
    arguments = {name: x[:, : 1 if world.rank else 0] for name, x in good(world.rank).items()}
    assert "fewer tokens than ranks: the ranks hold [0, 1, 1, 1]" in told(world, group_of(4), arguments)
    with pytest.raises(ValueError, match="3 tokens cannot be cut over 4 ranks"):
        lasp.shard(torch.zeros(1, 3), group_of(4))


def test_zigzag_takes_only_the_even_cut(world, group_of) -> None:
    arguments = {name: x[:, : 6 - (world.rank == 1)] for name, x in good(world.rank).items()}
    message = told(world, group_of(4, layout="zigzag"), arguments)
    assert "are cut as [5, 6, 6, 6], but the ranks hold [6, 5, 6, 6]" in message


def test_an_unknown_layout(group_of) -> None:
    with pytest.raises(ValueError, match="layout must be one of contiguous, zigzag, got 'spiral'"):
        group_of(4, layout="spiral")


def test_groups_must_agree_when_they_are_made(world, subgroups) -> None:
    with pytest.raises(ValueError, match="ranks disagree on checks: rank 0: True, rank 1: False"):
        lasp.SequenceGroup.from_group(subgroups[4], checks=world.rank == 0)


# What rank WRONG_RANK says where the others say sp=4, and the message.
MESHES: dict[str, tuple[dict[str, Any], str]] = {
    "too small": ({"sp": 3}, "dp x sp x tp = 1 x 3 x 1 = 3 ranks, but the world has 4 (rank 2 of 4)"),
    "nothing": ({"sp": 0}, "must be at least 1, got {'dp': None, 'sp': 0, 'tp': 1} (rank 2 of 4)"),
    "replicas": ({"sp": 1}, "ranks disagree on dp: rank 0: 1, rank 1: 1, rank 2: 4, rank 3: 1"),
    "two of two": ({"sp": 2, "dp": 2}, "ranks disagree on dp: rank 0: 1, rank 1: 1, rank 2: 2, rank 3: 1"),
    "tensors": ({"sp": 1, "tp": 4}, "ranks disagree on sp: rank 0: 4, rank 1: 4, rank 2: 1, rank 3: 4"),
    "text": ({"sp": "4"}, "(rank 2 of 4)"),
}


@pytest.mark.parametrize("name", MESHES)
def test_ranks_agree_on_a_mesh(world, name: str) -> None:
    sizes, message = MESHES[name]
    with pytest.raises(ValueError) as caught:
        lasp.init_mesh(**({"sp": 4} | (sizes if world.rank == WRONG_RANK else {})), device="cpu")
    messages = world.allgather(str(caught.value))
    assert len(set(messages)) == 1, messages
    assert message in messages[0]


def test_a_mesh_must_multiply_to_the_world(world) -> None:
    with pytest.raises(ValueError, match="dp x sp x tp = 1 x 3 x 1 = 3 ranks, but the world has 4"):
        lasp.init_mesh(sp=3, device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": "seq"}, "the mesh has axes dp, sp, tp, not 'seq' (rank 2 of 4)"),
        ({"axis": "dp"}, "ranks disagree on axis: rank 0: sp, rank 1: sp, rank 2: dp"),
        ({"layout": "zigzag"}, "ranks disagree on layout: rank 0: contiguous"),
        ({"layout": "spiral"}, "ranks disagree on layout: rank 0: contiguous, rank 1: contiguous, rank 2: spiral"),
        ({"heads": 2}, "ranks disagree on heads: rank 0: 1"),
        ({"checks": False}, "ranks disagree on checks: rank 0: True"),
    ],
)
def test_ranks_agree_on_a_group_of_a_mesh(world, own_groups, options: dict[str, Any], message: str) -> None:
    """Two sequences of two ranks: the ranks of the other sequence hear of it too."""
    mesh = lasp.init_mesh(sp=2, device="cpu")
    with pytest.raises(ValueError) as caught:
        lasp.SequenceGroup.from_mesh(mesh, **(options if world.rank == WRONG_RANK else {}))
    messages = world.allgather(str(caught.value))
    assert len(set(messages)) == 1, messages
    assert message in messages[0]
    group = lasp.SequenceGroup.from_mesh(mesh)
    assert lasp.unshard(torch.ones(1, 2), group).shape == (1, 4)


def test_losses_and_shards_refuse_what_does_not_fit(world, group_of) -> None:
    group, wrong = group_of(4), world.rank == WRONG_RANK
    logits, labels = torch.randn(1, 6, 11), torch.zeros(1, 6, dtype=torch.long)
    for spoiled, message in (
        ((logits[..., :7] if wrong else logits, labels), "ranks disagree on vocabulary"),
        ((logits, labels + (20 if wrong else 0)), "labels must lie in 0..10 or be -100, got 20..20 (rank 2 of 4)"),
        ((logits, labels[:, :5] if wrong else labels), "need labels [1, 6], got [1, 5] (rank 2 of 4)"),
    ):
        with pytest.raises(ValueError) as caught:
            lasp.cross_entropy(*spoiled, group=group)
        assert message in str(caught.value)
    with pytest.raises(ValueError, match="ranks disagree on shape: rank 0: \\[1, 3\\]"):
        lasp.unshard(torch.zeros(1, 5, 4 if wrong else 3), group)
    with pytest.raises(ValueError, match="got pixel_values"):
        lasp.shard_batch({"input_ids": labels, "pixel_values": logits}, group)
    with pytest.raises(ValueError, match="labels has shape \\[1, 5\\], but the batch has 6 tokens"):
        lasp.shard_batch({"input_ids": labels, "labels": labels[:, :5]}, group)
