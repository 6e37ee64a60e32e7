"""Mamba's selective scan: token by token, over ranks, and in how much memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lasp.functional import selective_scan
from lasp.kernels import reference
from tests.ranks import CUTS, DOCUMENTS, assert_same, cut_results, results

CHANNELS, STATES = 6, 4


@cache
def case(packed: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Steps of nothing to such that forget everything; what comes of them token by token."""
    rng = torch.Generator().manual_seed(0)
    batch, documents = (1, len(DOCUMENTS) - 1) if packed else (2, 2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    tokens = {name: normal(batch, 37, dim) for name, dim in (("u", CHANNELS), ("key", STATES), ("query", STATES))}
    tokens["step"] = (normal(batch, 37, CHANNELS) * 3).exp() * (normal(batch, 37, 1) > -1)
    fixed = {"rates": -normal(CHANNELS, STATES).exp(), "initial_state": normal(documents, CHANNELS, STATES)}
    grad = normal(batch, 37, CHANNELS)
    bounds = {"cu_seqlens": DOCUMENTS} if packed else {}
    return tokens, fixed, grad, results(reference.selective_scan, tokens, fixed, grad, **bounds)


def scanned(**given: Any) -> Any:
    return selective_scan(**given, output_final_state=True, chunk_size=4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_token_by_token(cut: str, packed: bool) -> None:
    tokens, fixed, grad, wanted = case(packed)
    assert_same(cut_results(scanned, tokens, fixed, grad, CUTS[cut], DOCUMENTS if packed else None), wanted)


@pytest.mark.parametrize("scan", ["ring", "doubling", "heads"])
def test_any_scan(scan: str) -> None:
    tokens, fixed, grad, wanted = case(False)
    assert_same(cut_results(lambda **given: scanned(**given, scan=scan), tokens, fixed, grad, CUTS["2"]), wanted)


def most_bytes(run: Any) -> int:
    """The most that was allocated at a time beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.slow
def test_memory_is_that_of_the_states_kept() -> None:
    """[T / 16, I, N] of a scan that keeps one of 16 states: both directions stay below twice that, inputs' gradients
    and outputs aside; all states would be 16 times as much."""
    length, channels, states = 2048, 128, 16
    u, step = torch.randn(2, 1, length, channels).unbind()
    key, query = torch.randn(2, 1, length, states).unbind()
    inputs = [x.requires_grad_() for x in (u, step.exp(), -torch.rand(channels, states), key, query)]
    kept, aside = length // 16 * channels * states * 4, 6 * u.nbytes + 4 * key.nbytes
    used = most_bytes(lambda: selective_scan(*inputs).sum().backward())
    assert kept < used < 2 * kept + aside


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"step": -torch.ones(2, 37, CHANNELS, dtype=torch.float64)}, "step must be >= 0, got a minimum of -1"),
        ({"rates": torch.ones(CHANNELS, STATES, dtype=torch.float64)}, "rates must be <= 0, got a maximum of 1"),
        ({"rates": torch.full((CHANNELS, STATES), -torch.inf)}, "step and rates must be finite"),
        ({"step": torch.full((2, 37, CHANNELS), torch.inf)}, "step and rates must be finite"),
        ({"key": torch.ones(2, 37, 3, dtype=torch.float64)}, r"key \[2, 37, 3\]"),
        ({"initial_state": torch.zeros(1, CHANNELS, STATES)}, r"\[2, 6, 4\], got \[1, 6, 4\]"),
    ],
)
def test_mistakes_are_value_errors(wrong: dict[str, Tensor], words: str) -> None:
    tokens, fixed, *_ = case(False)
    with pytest.raises(ValueError, match=words):
        scanned(**{**tokens, **fixed, **wrong})
