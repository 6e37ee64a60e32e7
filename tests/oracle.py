"""Shared by the tests: random problems, the token-by-token reference with its gradients, and the errors against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels import reference

DECAYS = ("none", "head", "token", "channel")
NAMES = ("q", "k", "v", "log_decay", "initial_state")


@dataclass(frozen=True)
class Problem:
    """Inputs of a linear attention over a whole sequence, and the gradients of its two outputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
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
) -> Problem:
    """A random problem. decay: one of DECAYS, log-decays in [-strength, 0]; heads: of q, k, v and gates."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    batch = 2 if cu_seqlens is None else 1
    (hq, hk, hv, hg), (key_dim, value_dim) = heads, dims
    shapes = {"head": (hg,), "token": (batch, length, hg), "channel": (batch, length, hg, key_dim)}
    log_decay = None
    if decay != "none":
        log_decay = (-strength * torch.rand(*shapes[decay], generator=rng, dtype=torch.float64)).to(dtype)
    states = max(hk, hv) if decay == "none" else max(hk, hv, hg)
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return Problem(
        normal(batch, length, hq, key_dim),
        normal(batch, length, hk, key_dim),
        normal(batch, length, hv, value_dim),
        log_decay,
        normal(rows, states, key_dim, value_dim).to(state_dtype) if initial else None,
        cu_seqlens,
        causal,
        normal(batch, length, max(hq, states), value_dim),
        normal(rows, states, key_dim, value_dim).to(state_dtype),
    )


def solve(problem: Problem, attention: Callable[..., tuple[Tensor, Tensor]] | None = None) -> dict[str, Tensor]:
    """Output, final state and all gradients of `attention`, in fp64 by the reference if none is given."""
    kind = torch.float64 if attention is None else None
    inputs = {name: x.detach().to(kind or x.dtype).requires_grad_() for name, x in problem.inputs.items()}
    gates = inputs.get("log_decay")
    output, final = (attention or reference.linear_attention)(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        gates,
        initial_state=inputs.get("initial_state"),
        cu_seqlens=problem.cu_seqlens,
        causal=problem.causal,
    )
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
