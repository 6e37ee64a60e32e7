"""Shared by the tests of the running log-sum-exp: random problems, and their results with all gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.kernels import reference


class SumProblem(NamedTuple):
    """Inputs over a whole sequence, and the gradients of the output and of the final state."""

    x: Tensor
    initial_state: Tensor | None
    grad_output: Tensor
    grad_final: Tensor
    options: dict[str, Any]


def make_sums(
    length: int = 37,
    *,
    exclusive: bool = False,
    initial: bool = True,
    spread: float = 3.0,
    cu_seqlens: Sequence[int] | None = None,
) -> SumProblem:
    """A random problem of 2 x 3 channels."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, 2, 3, generator=rng, dtype=torch.float64)

    batch, rows = (2, 2) if cu_seqlens is None else (1, len(cu_seqlens) - 1)
    state = normal(rows) if initial else None
    options = {"exclusive": exclusive, "cu_seqlens": cu_seqlens}
    return SumProblem(spread * normal(batch, length), state, normal(batch, length), normal(rows), options)


def solve_sums(problem: SumProblem, operation: Callable[..., tuple[Tensor, Tensor]] | None = None) -> dict[str, Tensor]:
    """Output, final state and gradients of `operation`; by the reference if none is given. Infinities are set to 0,
    and so is what flows into them."""
    inputs = {"x": problem.x} | ({} if problem.initial_state is None else {"initial_state": problem.initial_state})
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    output, final = (operation or reference.logcumsumexp)(**inputs, **problem.options)
    finite = [tensor.masked_fill(tensor.isinf(), 0) for tensor in (output, final)]
    wanted = [problem.grad_output, problem.grad_final]
    grads = torch.autograd.grad(finite, list(inputs.values()), wanted, allow_unused=True, materialize_grads=True)
    found = {"output": finite[0].detach(), "final_state": finite[1].detach()}
    return found | {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}
