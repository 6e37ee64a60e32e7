"""Shared by the tests: random problems, the token-by-token reference with its gradients, and the errors against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels import reference

DECAYS = ("none", "head", "token", "channel")
NAMES = ("q", "k", "v", "log_decay", "beta", "initial_state")


@dataclass(frozen=True)
class Problem:
    """Inputs of a recurrence over a whole sequence, and the gradients of its two outputs.

    With beta it is a delta rule, without one a linear attention.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Sequence[int] | None
    causal: bool
    grad_output: Tensor
    grad_final: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The differentiable inputs by name."""
        return {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}


def make_problem(
    decay: str,
    length: int = 37,
    *,
    strength: float = 1.0,
    cu_seqlens: Sequence[int] | None = None,
    causal: bool = True,
    initial: bool = True,
    heads: tuple[int, int, int, int] = (4, 2, 2, 2),
    dims: tuple[int, int] = (6, 5),
    dtype: torch.dtype = torch.float64,
    beta: float | None = None,
) -> Problem:
    """A random problem. decay: one of DECAYS, log-decays in [-strength, 0]; heads: of q, k, v and gates.

    beta: the largest, which every fifth token has; every seventh has 0. Keys are then of length 1, and betas have as
    many heads as v. None: a linear attention.
    """
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    batch = 2 if cu_seqlens is None else 1
    (hq, hk, hv, hg), (key_dim, value_dim) = heads, dims
    shapes = {"head": (hg,), "token": (batch, length, hg), "channel": (batch, length, hg, key_dim)}
    log_decay = None
    if decay != "none":
        log_decay = (-strength * torch.rand(*shapes[decay], generator=rng, dtype=torch.float64)).to(dtype)
    k, betas = normal(batch, length, hk, key_dim), None
    if beta is not None:
        k = torch.nn.functional.normalize(k, dim=-1)
        betas = (beta * torch.rand(batch, length, hv, generator=rng, dtype=torch.float64)).to(dtype)
        betas[:, ::5], betas[:, 3::7] = beta, 0
    states = max(hk, hv) if decay == "none" else max(hk, hv, hg)
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return Problem(
        normal(batch, length, hq, key_dim),
        k,
        normal(batch, length, hv, value_dim),
        log_decay,
        betas,
        normal(rows, states, key_dim, value_dim).to(state_dtype) if initial else None,
        cu_seqlens,
        causal,
        normal(batch, length, max(hq, states), value_dim),
        normal(rows, states, key_dim, value_dim).to(state_dtype),
    )


def solve(problem: Problem, attention: Callable[..., tuple[Tensor, Tensor]] | None = None) -> dict[str, Tensor]:
    """Output, final state and all gradients of `attention`, in fp64 by the reference if none is given.

    attention: called as `lasp.linear_attention`, or as `lasp.delta_rule` where the problem has a beta.
    """
    kind = torch.float64 if attention is None else None
    inputs = {name: x.detach().to(kind or x.dtype).requires_grad_() for name, x in problem.inputs.items()}
    tokens, gates = (inputs["q"], inputs["k"], inputs["v"]), inputs.get("log_decay")
    whole = {"initial_state": inputs.get("initial_state"), "cu_seqlens": problem.cu_seqlens}
    if problem.beta is None:
        run = attention or reference.linear_attention
        output, final = run(*tokens, gates, causal=problem.causal, **whole)
    else:
        output, final = (attention or reference.delta_rule)(*tokens, inputs["beta"], gates, **whole)
    grads = torch.autograd.grad(
        [output, final],
        list(inputs.values()),
        [problem.grad_output.to(output.dtype), problem.grad_final.to(final.dtype)],
    )
    found = {"output": output.detach(), "final_state": final.detach()}
    return found | {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor], problem: Problem) -> dict[str, float]:
    """Largest error of each result relative to its largest entry; of gates relative to max(|ref|, |q * dq|)."""
    told = {}
    for name, value in expected.items():
        size = value.abs().max()
        if name == "dlog_decay":
            size = torch.maximum(size, (problem.q.double() * expected["dq"]).abs().max())
        told[name] = ((found[name].double() - value).abs().max() / size).item() if value.numel() else 0.0
    return told


def assert_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], problem: Problem, limit: float, gates: float | None = None
) -> None:
    """Fail with every result's error when one is above `limit`, or a gate's gradient above `gates`."""
    told = errors(found, expected, problem)
    bad = [name for name, error in told.items() if not error <= (gates or limit if name == "dlog_decay" else limit)]
    assert not bad, f"{', '.join(bad)} above {limit}: " + ", ".join(f"{n} {e:.1e}" for n, e in told.items())
