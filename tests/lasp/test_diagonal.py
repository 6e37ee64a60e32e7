"""Diagonal complex state spaces: token by token, and over ranks, whose states are complex."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from lasp.functional import diagonal_state_space
from lasp.kernels import reference
from lasp.parallel.scan import Gather
from tests.ranks import CUTS, DOCUMENTS, assert_same, cut_results, results

CHANNELS, STATES = 4, 3


@cache
def case(packed: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Rates from those that forget nothing to e^-3 a token, of any phase; what comes of them token by token."""
    rng = torch.Generator().manual_seed(0)
    batch, documents = (1, len(DOCUMENTS) - 1) if packed else (2, 2)

    def normal(*shape: int, dtype: torch.dtype = torch.complex128) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=dtype)

    rates = torch.complex(torch.linspace(-3, 0, CHANNELS * STATES), torch.linspace(-9, 9, CHANNELS * STATES))
    fixed = {
        "rates": rates.view(CHANNELS, STATES).to(torch.complex128),
        "weights": normal(CHANNELS, STATES),
        "initial_state": normal(documents, CHANNELS, STATES),
    }
    tokens = {"u": normal(batch, 37, CHANNELS, dtype=torch.float64)}
    grad = normal(batch, 37, CHANNELS, dtype=torch.float64)
    bounds = {"cu_seqlens": DOCUMENTS} if packed else {}
    return tokens, fixed, grad, results(reference.diagonal_state_space, tokens, fixed, grad, **bounds)


def driven(**given: Any) -> Any:
    return diagonal_state_space(**given, output_final_state=True, chunk_size=4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_token_by_token(cut: str, packed: bool) -> None:
    tokens, fixed, grad, wanted = case(packed)
    assert_same(cut_results(driven, tokens, fixed, grad, CUTS[cut], DOCUMENTS if packed else None), wanted)


@pytest.mark.parametrize("scan", ["ring", "doubling", "pipeline", "heads"])
def test_any_scan(scan: str) -> None:
    tokens, fixed, grad, wanted = case(False)
    assert_same(cut_results(lambda **given: driven(**given, scan=scan), tokens, fixed, grad, CUTS["2"]), wanted)


def test_one_convolution_is_what_many_chunks_are() -> None:
    tokens, fixed, *_ = case(False)
    whole, _ = diagonal_state_space(**tokens, **fixed, output_final_state=True)
    torch.testing.assert_close(whole, driven(**tokens, **fixed)[0], rtol=1e-10, atol=1e-10)


def test_phases_of_many_turns_are_kept_in_fp32() -> None:
    """A rate of pi·31/10 a token that forgets nothing, over 4000 tokens."""
    u = torch.randn(1, 4000, 1, generator=torch.Generator().manual_seed(0))
    rates = torch.full((1, 1), 1j * math.pi * 3.1, dtype=torch.complex64)
    found = diagonal_state_space(u, rates, torch.ones_like(rates))
    wanted = diagonal_state_space(u.double(), rates.to(torch.complex128), torch.ones(1, 1, dtype=torch.complex128))
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rates": torch.ones(CHANNELS, STATES, dtype=torch.complex128)}, "must not grow, got a real part of 1"),
        (
            {"weights": torch.ones(CHANNELS, STATES)},
            "weights complex, got torch.float64, torch.complex128, torch.float32",
        ),
        ({"initial_state": torch.zeros(2, CHANNELS, STATES)}, r"complex \[2, 4, 3\], got torch.float32"),
        ({"u": torch.ones(2, 37, 5, dtype=torch.float64)}, r"u \[2, 37, 5\]"),
        ({"scan": Gather(wire=torch.bfloat16)}, "not rounded on the wire"),
    ],
)
def test_mistakes_are_value_errors(wrong: dict[str, Any], words: str) -> None:
    tokens, fixed, *_ = case(False)
    with pytest.raises(ValueError, match=words):
        driven(**{**tokens, **fixed, **wrong})
