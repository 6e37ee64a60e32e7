"""The stages that a scan over ranks travels between, with both halves of a sequence in one process.

Every implementation, forwards and backwards, against the token-by-token reference.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import tests.interpreter  # noqa: F401 - mends Triton's interpreter
from lasp.kernels.backend import BACKENDS, implementation
from lasp.kernels.inputs import Gradients, Inputs
from lasp.kernels.recurrence import Recurrence
from tests.fla_operators import in_place_of_fla
from tests.oracle import Problem, make_problem, solve

HALF, LENGTH, CHUNK = 23, 37, {"torch": 8, "triton": 16, "fla": 64}


def halves(x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The tokens of either half; what has none is in both."""
    if x is None or x.dim() == 1:
        return x, x
    return x[:, :HALF], x[:, HALF:]


def joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """The inverse, of gradients."""
    if first is None or second is None:
        return None
    return first + second if first.dim() == 1 else torch.cat([first, second], 1)


def set_up(backend: str, problem: Problem, length: int) -> Recurrence:
    """One half, whose tokens are one run."""
    kind = implementation(backend, problem.q, CHUNK[backend], erases=problem.beta is not None)
    scale = problem.q.shape[3] ** -0.5
    heads = max(problem.k.shape[2], problem.v.shape[2])
    return kind(((0, length),), heads=heads, scale=scale, causal=True, chunk_size=CHUNK[backend])


def by_halves(backend: str, problem: Problem) -> tuple[Tensor, Gradients]:
    """Output and gradients: each half computes by itself what it can, and then takes what the other sends."""
    names = ("q", "k", "v", "log_decay", "beta")
    whole = [None if x is None else x.requires_grad_() for x in (getattr(problem, name) for name in names)]
    inputs = [Inputs(*half) for half in zip(*map(halves, whole), strict=True)]
    grads = [x for x in halves(problem.grad_output) if x is not None]
    ranks = [set_up(backend, problem, length) for length in (HALF, LENGTH - HALF)]
    with torch.no_grad():
        chains = [rank.states(own) for rank, own in zip(ranks, inputs, strict=True)]
        inside = [rank.inside(*given) for rank, *given in zip(ranks, inputs, chains, strict=True)]
        for chain, entering in zip(chains, (None, chains[0].segment(0).state), strict=True):
            chain.enter([entering])
        output = [rank.read_out(*given) for rank, *given in zip(ranks, inputs, chains, inside, strict=True)]
        chains = [rank.restore(own, chain.tensors()) for rank, own, chain in zip(ranks, inputs, chains, strict=True)]
        adjoints = [rank.adjoint(*given) for rank, *given in zip(ranks, inputs, grads, chains, strict=True)]
        found = [rank.grad_outputs(*given) for rank, *given in zip(ranks, inputs, grads, chains, strict=True)]
        for adjoint, entering in zip(adjoints, (adjoints[1].segment(0).state, None), strict=True):
            adjoint.enter([entering])
        parts = [r.grad_states(*given) for r, *given in zip(ranks, inputs, chains, adjoints, found, strict=True)]
    return torch.cat(output, 1), Gradients(*map(joined, *parts))


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize(
    ("decay", "beta"),
    [("none", None), ("head", None), ("token", None), ("channel", None), ("token", 2.0), ("channel", 1.0)],
)
def test_two_halves_equal_the_whole(backend: str, decay: str, beta: float | None) -> None:
    if backend == "torch":
        limit, problem = 1e-12, make_problem(decay, LENGTH, initial=False, beta=beta)
    else:  # in Triton's interpreter every head takes seconds
        small = {"heads": (1, 1, 1, 1), "dims": (16, 16), "cu_seqlens": (0, LENGTH), "dtype": torch.float32}
        limit, problem = 1e-5, make_problem(decay, LENGTH, initial=False, beta=beta, **small)
    problem.grad_final.zero_()
    expected = solve(problem)
    with in_place_of_fla() if backend == "fla" else nullcontext():
        output, grads = by_halves(backend, problem)
    seen = {"output": output} | {f"d{name}": grad for name, grad in grads._asdict().items() if grad is not None}
    assert {*seen} == {*expected} - {"final_state"}
    for name, value in seen.items():
        assert (value - expected[name]).norm() < limit * expected[name].norm(), name
