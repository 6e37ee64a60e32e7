"""The chunked kernel of the delta family on one device, against the token-by-token reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import lasp
from lasp.kernels import reference
from tests.oracle import Problem, assert_close, errors, make_problem, solve

DECAYS = ("none", "token", "channel")  # DeltaNet, Gated DeltaNet, KDA

delta_rule = partial(lasp.delta_rule, output_final_state=True, chunk_size=8)


def make(decay: str, length: int = 37, **options: Any) -> Problem:
    return make_problem(decay, length, beta=options.pop("beta", 2.0), **options)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [1, 7, 8, 37, 64])  # one token, below, at, across and a multiple of the chunk
def test_parity(decay: str, length: int) -> None:
    problem = make(decay, length)
    assert_close(solve(problem, delta_rule), solve(problem), problem, 1e-12)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("heads", [(2, 2, 2, 2), (4, 2, 2, 1), (1, 1, 4, 2), (4, 4, 1, 4)])
def test_grouped_heads(decay: str, heads: tuple[int, int, int, int]) -> None:
    problem = make(decay, heads=heads)
    assert_close(solve(problem, delta_rule), solve(problem), problem, 1e-12)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("initial", [True, False])
def test_documents(decay: str, initial: bool) -> None:
    problem = make(decay, cu_seqlens=(0, 1, 2, 10, 10, 26, 37, 37), initial=initial)
    assert_close(solve(problem, delta_rule), solve(problem), problem, 1e-12)


@pytest.mark.parametrize("decay", DECAYS[1:])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_strong_decays(decay: str, share: float) -> None:
    """Gates down to -50, all of them or a third beside gates of 0."""
    problem = make(decay, 64, strength=50.0)
    gates = problem.log_decay
    gates[torch.rand(gates.shape, generator=torch.Generator().manual_seed(1)) > share] = 0
    assert_close(solve(problem, delta_rule), solve(problem), problem, 1e-10)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("strength", [0.1, 50.0])
def test_fp32(decay: str, strength: float) -> None:
    problem = make(decay, 150, strength=strength, dims=(32, 16), dtype=torch.float32, beta=1.0)
    assert_close(solve(problem, partial(delta_rule, chunk_size=64)), solve(problem), problem, 1e-5, gates=1e-4)


@pytest.mark.parametrize("decay", DECAYS)
def test_bf16_is_within_twice_the_error_of_bf16_pytorch(decay: str) -> None:
    problem = make(decay, 100, strength=0.1, dims=(32, 16), dtype=torch.bfloat16, beta=1.0)

    def all_in_bf16(*args: torch.Tensor, initial_state: torch.Tensor, **options: object) -> tuple:
        return reference.delta_rule(*args, initial_state=initial_state.bfloat16(), **options)

    exact = solve(problem)
    ours = errors(solve(problem, delta_rule), exact, problem)
    peer = errors(solve(problem, all_in_bf16), exact, problem)
    assert not {name: (ours[name], peer[name]) for name in ours if ours[name] > 2 * peer[name]}


@pytest.mark.parametrize("decay", DECAYS)
def test_without_erasure_it_is_linear_attention(decay: str) -> None:
    """Keys that are orthogonal to all others erase nothing: beta only scales what is written."""
    problem = make(decay, 6, dims=(6, 5), heads=(2, 1, 2, 2), initial=False, strength=0.0)
    keys = torch.eye(6, dtype=torch.float64).view(1, 6, 1, 6).expand(2, -1, -1, -1)
    written = problem.v * problem.beta.unsqueeze(-1)
    found = lasp.delta_rule(problem.q, keys, problem.v, problem.beta, problem.log_decay, chunk_size=4)
    torch.testing.assert_close(found, lasp.linear_attention(problem.q, keys, written), rtol=0, atol=1e-12)


def test_householder_steps_of_a_token() -> None:
    """DeltaProduct (arXiv:2502.10297): two steps to a token, the gate on the first, read after the second."""
    problem = make("token", 20)
    gates, q = problem.log_decay.clone(), problem.q[:, 1::2]
    gates[:, 1::2] = 0
    args = (problem.k, problem.v, problem.beta, gates)
    found = lasp.delta_rule(problem.q, *args, chunk_size=8)[:, 1::2]

    k, v, beta = (x.repeat_interleave(2 // x.shape[2], 2) for x in args[:3])
    state = torch.zeros(2, 2, 6, 5, dtype=torch.float64)
    for token in range(10):
        step = torch.eye(6, dtype=torch.float64).expand(2, 2, 6, 6)
        state = gates[:, 2 * token].exp()[..., None, None] * state
        for t in (2 * token, 2 * token + 1):
            column = k[:, t].unsqueeze(-1)
            step = torch.eye(6) - beta[:, t][..., None, None] * column @ column.mT
            state = step @ state + beta[:, t][..., None, None] * column @ v[:, t].unsqueeze(-2)
        read = torch.einsum("bhk,bhkv->bhv", q[:, token], state.repeat_interleave(2, 1)) * 6**-0.5
        torch.testing.assert_close(found[:, token], read, rtol=0, atol=1e-12)


def test_nothing_of_tokens_times_chunk_is_kept_for_backward() -> None:
    saved: list[int] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.append(x.numel())
        return x

    problem = make("token", 512, dims=(8, 8), heads=(1, 1, 1, 1))
    q = problem.q.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        lasp.delta_rule(q, problem.k, problem.v, problem.beta, problem.log_decay, chunk_size=256)
    assert len(saved) == 7  # q, k, v, log_decay, beta, the states between chunks and their transfers
    assert max(saved) <= problem.q.numel()


def test_empty_sequence_returns_its_initial_state() -> None:
    problem = make("token", length=0)
    args = (problem.q, problem.k, problem.v, problem.beta, problem.log_decay)
    output, final = delta_rule(*args, initial_state=problem.initial_state)
    assert output.shape == (2, 0, 4, 5)
    assert torch.equal(final, problem.initial_state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {**a, "beta": a["beta"] - 0.5}, "beta must lie in [0, 2], got values from -0.5 to 1.5"),
        (lambda a: {**a, "beta": a["beta"] + 0.5}, "beta must lie in [0, 2], got values from 0.5 to 2.5"),
        (lambda a: {**a, "k": a["k"] * 1.1}, "beta·|k|^2 must not exceed 2 (normalise the keys), got 2.42"),
        (lambda a: {**a, "beta": a["beta"][:, 1:]}, "beta must be [B, T, H] and share batch and tokens with k"),
        (lambda a: {**a, "beta": a["beta"].repeat(1, 1, 3)}, "numbers of heads must divide one another"),
        (lambda a: {**a, "beta": a["beta"].long()}, "beta must be floating"),
        (lambda a: {**a, "log_decay": a["log_decay"][0, 0]}, "log_decay must be [B, T, H] or [B, T, H, K], got [2]"),
        (lambda a: {**a, "log_decay": -a["log_decay"]}, "log_decay must be <= 0"),
    ],
)
def test_refuses(change: Any, message: str) -> None:
    arguments = make("token").inputs
    with pytest.raises(ValueError) as error:
        lasp.delta_rule(**change(arguments))
    assert message in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_normalised_in_their_own_dtype_are_accepted(dtype: torch.dtype) -> None:
    problem = make("none", 200, dims=(64, 8), dtype=dtype)
    k = torch.nn.functional.normalize(problem.k, dim=-1)
    assert lasp.delta_rule(problem.q, k, problem.v, torch.full_like(problem.beta, 2.0)).isfinite().all()
