"""Shared by the tests of the causal convolution: random problems, and their results with all gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels import reference


@dataclass(frozen=True)
class ConvProblem:
    """Inputs of a convolution over a whole sequence, and the gradients of its output and final state."""

    inputs: dict[str, Tensor]  # x, weight and perhaps bias, initial_state
    grad_output: Tensor
    grad_final: Tensor
    activation: str | None
    cu_seqlens: Sequence[int] | None


def make_convolution(
    width: int = 4,
    length: int = 37,
    *,
    bias: bool = True,
    initial: bool = True,
    activation: str | None = "silu",
    cu_seqlens: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> ConvProblem:
    """A random problem of 3 channels."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    batch, rows = (2, 2) if cu_seqlens is None else (1, len(cu_seqlens) - 1)
    inputs = {"x": normal(batch, length, 3), "weight": normal(3, width)}
    if bias:
        inputs["bias"] = normal(3)
    if initial:
        inputs["initial_state"] = normal(rows, 3, width - 1)
    return ConvProblem(inputs, normal(batch, length, 3), normal(rows, 3, width - 1), activation, cu_seqlens)


def solve_convolution(
    problem: ConvProblem, convolution: Callable[..., tuple[Tensor, Tensor]] | None = None
) -> dict[str, Tensor]:
    """Output, final state and all gradients of `convolution`, in fp64 by the reference if none is given."""
    kind = torch.float64 if convolution is None else None
    inputs = {name: x.detach().to(kind or x.dtype).requires_grad_() for name, x in problem.inputs.items()}
    output, final = (convolution or reference.causal_conv1d)(
        **inputs, activation=problem.activation, cu_seqlens=problem.cu_seqlens
    )
    wanted = [problem.grad_output.to(output.dtype), problem.grad_final.to(final.dtype)]
    # The loop of the reference over no tokens never meets the weights.
    unused = convolution is None
    grads = torch.autograd.grad(
        [output, final], list(inputs.values()), wanted, allow_unused=unused, materialize_grads=unused
    )
    found = {"output": output.detach(), "final_state": final.detach()}
    return found | {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of any result relative to its largest entry; NaN is one of infinite size."""
    errors = [
        ((found[name].double() - value).abs().max() / value.abs().max().clamp(min=0.1)).item()
        for name, value in expected.items()
        if value.numel()
    ]
    return max(float("inf") if error != error else error for error in errors)
