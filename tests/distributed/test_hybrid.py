"""Hybrids and encoders with the sequence cut over four ranks: what they are on one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lasp
from lasp.models import (
    LinearLlamaConfig,
    LinearLlamaForCausalLM,
    LinearRobertaConfig,
    LinearRobertaForMaskedLM,
)

pytestmark = pytest.mark.mpi(min_size=4)

LENGTH, STEPS, VOCABULARY = 47, 8, 31
# Documents of one token, none, on a border of ranks, over three ranks.
DOCUMENTS = [(0, 1, 12, 12, 40, 47), (0, 30, 47)]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
layouts = pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def plain_training(once) -> Callable[[str], tuple[list[float], Gradients]]:
    """Training on one device."""
    return cache(lambda pattern: once(train, pattern, None))


def gradients(model: nn.Module) -> Gradients:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(found: Gradients, expected: Gradients, tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max(), name


# Language models


def batches() -> Iterator[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        # One token follows from another, so that there is something to learn.
        ids = (torch.randint(0, 5, (1, LENGTH), generator=rng).cumsum(1) * 3) % VOCABULARY
        yield {"input_ids": ids, "labels": ids, "cu_seqlens": torch.tensor(DOCUMENTS[step % 2])}


def train(pattern: str, group: lasp.SequenceGroup | None) -> tuple[list[float], Gradients]:
    """The loss of each step, and the gradients of the first."""
    torch.manual_seed(0)
    layers = 4 if len(pattern) == 4 else 2
    config = LinearLlamaConfig(**SIZES, num_hidden_layers=layers, pattern=pattern, mixer="lightning")
    model = LinearLlamaForCausalLM(config).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, first = [], {}
    for batch in batches():
        loss = model(**(batch if group is None else lasp.shard_batch(batch, group)), group=group).loss
        optimizer.zero_grad()
        loss.backward()
        if group is not None:
            lasp.sync_gradients(model, group)
        first = first or gradients(model)
        optimizer.step()
        losses.append(loss.item())
    return losses, first


@pytest.mark.parametrize(
    ("pattern", "layout"),
    [
        ("LLLN", "contiguous"),
        ("LNLN", "zigzag"),
        pytest.param("LLLN", "zigzag", marks=pytest.mark.slow),
        pytest.param("LNLN", "contiguous", marks=pytest.mark.slow),
    ],
)
def test_a_hybrid_has_the_curve_of_one_device(group_of, plain_training, pattern: str, layout: str) -> None:
    expected_losses, expected_gradients = plain_training(pattern)
    losses, first = train(pattern, group_of(4, layout, checks=False))
    assert losses == pytest.approx(expected_losses, rel=1e-9)
    assert_same(first, expected_gradients)
    assert min(losses) < losses[0] - 0.2


@layouts
def test_positions_follow_from_where_the_tokens_lie(group_of, layout: str) -> None:
    model = LinearLlamaForCausalLM(LinearLlamaConfig(**SIZES, num_hidden_layers=2, pattern="LN")).double()
    ids, group = torch.arange(48).view(1, -1) % VOCABULARY, group_of(4, layout)
    with torch.no_grad():
        logits = lasp.unshard(model(lasp.shard(ids, group), group=group).logits, group)
        torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-10)


# Encoders


def masked_batch(kind: str) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(2)
    rows = 1 if kind == "documents" else 2
    ids = torch.randint(0, VOCABULARY - 1, (rows, LENGTH), generator=rng)
    masked = torch.rand(ids.shape, generator=rng) < 0.3
    batch = {"input_ids": ids.masked_fill(masked, VOCABULARY - 1), "labels": ids.masked_fill(~masked, -100)}
    if kind == "documents":
        return batch | {"cu_seqlens": torch.tensor(DOCUMENTS[0])}
    lengths = torch.tensor([[LENGTH], [20]])  # the last two ranks of a contiguous cut hold nothing but padding of row 2
    return batch | {"attention_mask": (torch.arange(LENGTH) < lengths).long()}


def restore(pattern: str, kind: str, group: lasp.SequenceGroup | None) -> tuple[float, Gradients]:
    """Loss and gradients of one masked batch."""
    torch.manual_seed(0)
    model = LinearRobertaForMaskedLM(LinearRobertaConfig(**SIZES, num_hidden_layers=2, pattern=pattern)).double()
    batch = masked_batch(kind)
    if group is not None:
        batch = lasp.shard_batch(batch, group, shift=False)
    loss = model(**batch, group=group).loss
    loss.backward()
    if group is not None:
        lasp.sync_gradients(model, group)
    return loss.item(), gradients(model)


@layouts
@pytest.mark.parametrize("kind", ["documents", "padding"])
@pytest.mark.parametrize("pattern", ["L", "LN"])
def test_an_encoder_has_loss_and_gradients_of_one_device(group_of, once, pattern: str, kind: str, layout: str) -> None:
    expected_loss, expected_gradients = once(restore, pattern, kind, None)
    loss, found = restore(pattern, kind, group_of(4, layout))
    assert loss == pytest.approx(expected_loss, rel=1e-9)
    assert_same(found, expected_gradients)
