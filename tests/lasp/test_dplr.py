"""The delta rule with transfers of a diagonal plus rank one: token by token, and over ranks."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lasp.functional import dplr_delta_rule
from lasp.kernels import reference
from tests.ranks import CUTS, DOCUMENTS, assert_same, cut_results, results

HEADS, KEYS, VALUES = 2, 6, 5


@cache
def case(packed: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Gates of RWKV-7, and a channel that one token in three forgets by e^-50; what comes of them token by token."""
    rng = torch.Generator().manual_seed(0)
    batch, documents = (1, len(DOCUMENTS) - 1) if packed else (2, 2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    read = normalize(normal(batch, 37, HEADS, KEYS), dim=-1)
    log_decay = -0.6 * normal(batch, 37, HEADS, KEYS).sigmoid()
    log_decay[:, ::3, :, 2] = -50
    tokens = {
        "q": normal(batch, 37, 2 * HEADS, KEYS),
        "k": normal(batch, 37, HEADS, KEYS),
        "v": normal(batch, 37, HEADS, VALUES),
        "read": read,
        "erase": read * normal(batch, 37, HEADS, KEYS).sigmoid(),
        "log_decay": log_decay,
    }
    fixed = {"initial_state": normal(documents, HEADS, KEYS, VALUES)}
    grad = normal(batch, 37, 2 * HEADS, VALUES)
    bounds = {"cu_seqlens": DOCUMENTS} if packed else {}
    return tokens, fixed, grad, results(reference.dplr_delta_rule, tokens, fixed, grad, **bounds)


def corrected(**given: Any) -> Any:
    return dplr_delta_rule(**given, output_final_state=True, chunk_size=4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_token_by_token(cut: str, packed: bool) -> None:
    tokens, fixed, grad, wanted = case(packed)
    assert_same(cut_results(corrected, tokens, fixed, grad, CUTS[cut], DOCUMENTS if packed else None), wanted)


@pytest.mark.parametrize("scan", ["ring", "doubling", "heads"])
def test_any_scan(scan: str) -> None:
    tokens, fixed, grad, wanted = case(False)
    assert_same(cut_results(lambda **given: corrected(**given, scan=scan), tokens, fixed, grad, CUTS["2"]), wanted)


def test_one_key_that_reads_and_erases_is_the_delta_rule() -> None:
    """With erasure before the decay, in which the delta rule with gates 1 agrees."""
    tokens, *_ = case(False)
    beta = torch.rand(2, 37, HEADS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, v, key = tokens["q"], tokens["v"], tokens["read"]
    found = dplr_delta_rule(q, beta[..., None] * key, v, key, beta[..., None] * key, torch.zeros_like(key))
    wanted, _ = reference.delta_rule(q, key, v, beta)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"erase": torch.ones(2, 37, HEADS, 1)}, r"erase must be shaped like k, \[2, 37, 2, 6\]"),
        ({"log_decay": torch.ones(2, 37, HEADS, KEYS)}, "log_decay must be <= 0"),
        ({"v": torch.ones(2, 37, 4, VALUES, dtype=torch.float64)}, "got 2, 4, 4"),
    ],
)
def test_mistakes_are_value_errors(wrong: dict[str, Tensor], words: str) -> None:
    tokens, fixed, *_ = case(False)
    with pytest.raises(ValueError, match=words):
        corrected(**{**tokens, **fixed, **wrong})
