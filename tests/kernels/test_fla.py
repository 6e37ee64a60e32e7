"""flash-linear-attention's operators behind our stages, on stand-ins, against the token-by-token reference."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

import lasp
from lasp.kernels import backend
from tests import fla_operators
from tests.fla_operators import chunk_gla, in_place_of_fla
from tests.oracle import DECAYS, assert_close, make_problem, solve


@pytest.fixture
def fla() -> Iterator[None]:
    with in_place_of_fla():
        yield


OPTIONS = [{}, {"cu_seqlens": (0, 1, 10, 10, 37)}, {"strength": 50.0, "initial": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("decay", "beta"), [(decay, beta) for decay in DECAYS for beta in (None, 2.0) if (decay, beta) != ("head", 2.0)]
)
def test_parity(fla: None, decay: str, beta: float | None, options: dict[str, Any]) -> None:
    problem = make_problem(decay, beta=beta, dtype=torch.float32, **options)
    run = lasp.linear_attention if beta is None else lasp.delta_rule
    found = solve(problem, partial(run, output_final_state=True, backend="fla"))
    assert_close(found, solve(problem), problem, 1e-5, gates=1e-4)


def test_the_plain_delta_rule_in_half_precision_has_an_operator_of_its_own(fla: None) -> None:
    problem = make_problem("none", beta=1.0, dtype=torch.bfloat16)
    found = solve(problem, partial(lasp.delta_rule, output_final_state=True, backend="fla"))
    assert_close(found, solve(problem), problem, 2e-2)


@pytest.mark.parametrize("backward", [False, True])
def test_alone_an_operator_runs_once_each_way(fla: None, monkeypatch: pytest.MonkeyPatch, backward: bool) -> None:
    calls = []
    monkeypatch.setattr(fla_operators, "chunk_gla", lambda *a, _own=chunk_gla, **o: (calls.append(1), _own(*a, **o))[1])
    q = torch.randn(1, 8, 2, 4, requires_grad=backward)
    output = lasp.linear_attention(q, q, q, -torch.rand(1, 8, 2, 4), backend="fla")
    if backward:
        output.sum().backward()
    assert len(calls) == 1 + backward


def test_no_gradient_where_none_is_asked(fla: None) -> None:
    q, k, v = (torch.randn(1, 8, 2, 4) for _ in range(3))
    v.requires_grad_()
    lasp.linear_attention(q, k, v, -torch.ones(2), backend="fla").sum().backward()
    assert v.grad is not None
    assert q.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": False}, "backend='fla' takes no causal=False"),
        ({"chunk_size": 32}, "backend='fla' takes a chunk_size of 64, got 32"),
        ({"dtype": torch.float64}, "backend='fla' takes float32, bfloat16 and float16, got torch.float64"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_what_it_cannot_do_is_refused(fla: None, options: dict[str, Any], message: str) -> None:
    options = dict(options)
    q = torch.randn(1, 8, 2, 4, dtype=options.pop("dtype", torch.float32))
    with pytest.raises(ValueError, match=message):
        lasp.linear_attention(q, q, q, backend="fla", **options)


def test_too_many_channels_for_the_delta_rule_are_refused(fla: None) -> None:
    q = torch.randn(1, 8, 2, 257)
    with pytest.raises(ValueError, match="backend='fla' takes at most 256 channels of keys in the delta rule, got 257"):
        lasp.delta_rule(q, q, q, torch.ones(1, 8, 2), backend="fla")


def test_without_the_package_or_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 8, 2, 4)
    with monkeypatch.context() as nothing_installed:
        nothing_installed.setattr(backend, "has_package", lambda name: False)
        with pytest.raises(ValueError, match="needs the package flash-linear-attention, which is not installed"):
            lasp.delta_rule(q, q, q, torch.ones(1, 8, 2), backend="fla")
    monkeypatch.delenv("TRITON_INTERPRET")
    with in_place_of_fla(), pytest.raises(ValueError, match="backend='fla' needs tensors on a GPU, got cpu"):
        lasp.linear_attention(q, q, q, backend="fla")
