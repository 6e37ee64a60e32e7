"""The chunked kernel of the decay family on one device, against the token-by-token reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import lasp
from lasp.kernels import reference
from lasp.kernels.decays import decay_factor
from tests.oracle import DECAYS, assert_close, errors, make_problem, solve

attention = partial(lasp.linear_attention, output_final_state=True, chunk_size=8)

LENGTHS = [1, 7, 8, 37, 64]  # one token, below, at, across and a multiple of the chunk
HEADS = {
    "plain": (2, 2, 2, 2),
    "shared keys and values": (4, 2, 2, 2),
    "shared queries and keys": (1, 1, 4, 4),
    "gates alone": (1, 1, 1, 4),
    "one gate": (4, 4, 4, 1),
}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", LENGTHS)
def test_parity(decay: str, length: int) -> None:
    problem = make_problem(decay, length)
    assert_close(solve(problem, attention), solve(problem), problem, 1e-12)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_grouped_heads(decay: str, heads: tuple[int, int, int, int]) -> None:
    problem = make_problem(decay, heads=heads)
    assert_close(solve(problem, attention), solve(problem), problem, 1e-12)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("initial", [True, False])
def test_documents(decay: str, initial: bool) -> None:
    problem = make_problem(decay, cu_seqlens=(0, 1, 2, 10, 10, 26, 37, 37), initial=initial)
    assert_close(solve(problem, attention), solve(problem), problem, 1e-12)


@pytest.mark.parametrize("cu_seqlens", [None, (0, 1, 10, 10, 37)])
def test_without_mask(cu_seqlens: tuple[int, ...] | None) -> None:
    problem = make_problem("none", cu_seqlens=cu_seqlens, causal=False)
    assert_close(solve(problem, attention), solve(problem), problem, 1e-12)


@pytest.mark.parametrize("decay", DECAYS[1:])
@pytest.mark.parametrize("strength", [20.0, 50.0])
def test_strong_decays(decay: str, strength: float) -> None:
    problem = make_problem(decay, 64, strength=strength)
    assert_close(solve(problem, attention), solve(problem), problem, 1e-10)


@pytest.mark.parametrize("decay", DECAYS[1:])
def test_decays_of_every_strength_at_once(decay: str) -> None:
    """A gate of -50 beside gates of 0: sums of log-decays must not lose the small ones."""
    problem = make_problem(decay, 64, strength=50.0)
    gates = problem.log_decay
    gates[torch.rand(gates.shape, generator=torch.Generator().manual_seed(1)) < 0.7] = 0
    assert_close(solve(problem, attention), solve(problem), problem, 1e-10)
    single = make_problem(decay, 64, strength=50.0, dtype=torch.float32)
    single.log_decay.copy_(gates)
    assert_close(solve(single, attention), solve(single), single, 1e-5, gates=1e-4)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("strength", [0.1, 20.0, 50.0])
def test_fp32(decay: str, strength: float) -> None:
    problem = make_problem(decay, 150, strength=strength, dims=(32, 16), dtype=torch.float32)
    found = solve(problem, partial(attention, chunk_size=64))
    assert_close(found, solve(problem), problem, 1e-5, gates=1e-4)


@pytest.mark.parametrize("decay", DECAYS)
def test_bf16_is_within_twice_the_error_of_bf16_pytorch(decay: str) -> None:
    problem = make_problem(decay, 100, strength=0.1, dims=(32, 16), dtype=torch.bfloat16)

    def all_in_bf16(*args: torch.Tensor, initial_state: torch.Tensor, **options: object) -> tuple:
        return reference.linear_attention(*args, initial_state=initial_state.bfloat16(), **options)

    exact = solve(problem)
    ours = errors(solve(problem, attention), exact, problem)
    peer = errors(solve(problem, all_in_bf16), exact, problem)
    worse = {name: (ours[name], peer[name]) for name in ours if ours[name] > 2 * peer[name]}
    assert not worse


def test_final_state_is_fp32_for_bf16_inputs() -> None:
    problem = make_problem("token", dtype=torch.bfloat16)
    output, final = attention(problem.q, problem.k, problem.v, problem.log_decay)
    assert (output.dtype, final.dtype) == (torch.bfloat16, torch.float32)


def test_empty_sequence_returns_its_initial_state() -> None:
    problem = make_problem("token", length=0)
    output, final = attention(problem.q, problem.k, problem.v, problem.log_decay, initial_state=problem.initial_state)
    assert output.shape == (2, 0, 4, 5)
    assert torch.equal(final, problem.initial_state)


def test_a_sequence_in_two_calls_equals_one_call() -> None:
    problem = make_problem("channel", 40)
    args = (problem.q, problem.k, problem.v, problem.log_decay)
    whole, final = attention(*args)
    first, state = attention(*(x[:, :13] for x in args))
    second, last = attention(*(x[:, 13:] for x in args), initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, final, rtol=0, atol=1e-12)


def test_nothing_of_tokens_times_chunk_is_kept_for_backward() -> None:
    """What a call saves grows with tokens x dim, however long the chunk; and autograd knows all of it."""
    saved: list[int] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved.append(x.numel())
        return x

    problem = make_problem("token", 512, dims=(8, 8), heads=(1, 1, 1, 1))
    q = problem.q.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        lasp.linear_attention(q, problem.k, problem.v, problem.log_decay, chunk_size=256)
    assert len(saved) == 6  # q, k, v, log_decay, the states between chunks and their transfers
    assert max(saved) <= problem.q.numel()


@pytest.mark.parametrize("decay", DECAYS[1:])
def test_a_gate_of_zero_forgets_everything(decay: str) -> None:
    """exp(log_decay) = 0, as a sigmoid in fp32 may give: -inf is allowed, and no NaN comes of it."""
    problem = make_problem(decay, 20)
    gates = problem.log_decay
    gates.view(-1)[:: 3 if gates.dim() > 1 else 2] = float("-inf")
    args = [x.requires_grad_() for x in (problem.q, problem.k, problem.v, gates)]
    output, final = attention(*args, initial_state=problem.initial_state)
    expected, state = reference.linear_attention(*args, initial_state=problem.initial_state)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(final, state, rtol=0, atol=1e-12)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output, args, problem.grad_output))


@pytest.mark.parametrize("decay", DECAYS)
def test_autocast_does_not_reach_inside(decay: str) -> None:
    problem = make_problem(decay, dtype=torch.float32)
    plain = solve(problem, attention)
    with torch.autocast("cpu", torch.bfloat16):
        inside = solve(problem, attention)
    assert all(torch.equal(plain[name], inside[name]) for name in plain)


def test_constant_gates_change_no_other_gradient() -> None:
    """Gates that are not trained skip their gradient; the others must not notice."""
    problem = make_problem("head")
    q = problem.q.requires_grad_()
    output = lasp.linear_attention(q, problem.k, problem.v, problem.log_decay)
    (dq,) = torch.autograd.grad(output, q, problem.grad_output)
    gates = problem.log_decay.clone().requires_grad_()
    output = lasp.linear_attention(q, problem.k, problem.v, gates)
    again = torch.autograd.grad(output, q, problem.grad_output)[0]
    torch.testing.assert_close(dq, again, rtol=0, atol=1e-12)  # fp64; with gates the products may be others


def test_decay_factors_are_never_denormal() -> None:
    for dtype in (torch.float32, torch.float64):
        factors = decay_factor(-torch.arange(0, 900, 0.5, dtype=dtype))
        smallest = factors[factors > 0].min()
        assert 1e3 < smallest / torch.finfo(dtype).tiny < 1e5
        assert factors[0] == 1
