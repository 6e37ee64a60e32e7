"""Shared by the tests of softmax attention: random problems, and their results with all gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lasp.kernels import reference


@dataclass(frozen=True)
class AttentionProblem:
    """Inputs of a softmax attention over a whole sequence, and the gradient of its output."""

    inputs: dict[str, Tensor]  # q, k, v and perhaps sinks
    key_mask: Tensor | None
    grad: Tensor
    options: dict[str, Any] = field(default_factory=dict)  # causal, window, softcap, cu_seqlens


def make_attention(
    length: int = 37,
    *,
    heads: tuple[int, int, int] = (4, 2, 2),
    dims: tuple[int, int] = (6, 5),
    sinks: bool = False,
    key_mask: bool = False,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> AttentionProblem:
    """A random problem. heads: of q, k and v."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    batch = 2 if options.get("cu_seqlens") is None else 1
    inputs = {
        "q": normal(batch, length, heads[0], dims[0]),
        "k": normal(batch, length, heads[1], dims[0]),
        "v": normal(batch, length, heads[2], dims[1]),
    }
    if sinks:
        inputs["sinks"] = normal(max(heads))
    shown = torch.rand(batch, length, generator=rng) > 0.4 if key_mask else None
    return AttentionProblem(inputs, shown, normal(batch, length, max(heads), dims[1]), options)


def solve_attention(problem: AttentionProblem, attention: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """Output and all gradients of `attention`, in fp64 by the reference if none is given."""
    kind = torch.float64 if attention is None else None
    inputs = {name: x.detach().to(kind or x.dtype).requires_grad_() for name, x in problem.inputs.items()}
    output = (attention or reference.softmax_attention)(**inputs, key_mask=problem.key_mask, **problem.options)
    grads = torch.autograd.grad(output, list(inputs.values()), problem.grad.to(output.dtype))
    return {"output": output.detach()} | {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of any result relative to its largest entry, or to 0.1; NaN is one of infinite size."""
    exact = {name: found[name].to(torch.promote_types(value.dtype, torch.float64)) for name, value in expected.items()}
    errors = [
        ((exact[n] - value).abs().max() / value.abs().max().clamp(min=0.1)).item() for n, value in expected.items()
    ]
    return max(float("inf") if error != error else error for error in errors)
