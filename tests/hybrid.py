"""Shared by the tests of hybrid attention: a random problem, and its results with all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LENGTH = 37
# Documents of one token, none, ending at a border of 10 | 9 | 9 | 9 and of 1 | 20 | 0 | 16, and across several ranks.
DOCUMENTS = (0, 1, 10, 10, 11, 33, 36, 37, 37)
VARIANTS: dict[str, dict[str, Any]] = {
    "window of one": {"window": 1},
    "window below a shard": {"window": 4, "factor": True},
    "window above a shard": {"window": 15, "relative": False},
    "window above all": {"window": 1000},
    "documents": {"window": 6, "cu_seqlens": DOCUMENTS},
    "everything": {"window": 5, "cu_seqlens": DOCUMENTS, "factor": True, "key_mask": True, "heads": (4, 2, 1, 4, 2)},
}


def make(
    window: int,
    cu_seqlens: tuple[int, ...] | None = None,
    factor: bool = False,
    key_mask: bool = False,
    heads: tuple[int, ...] = (4, 2, 2, 4, 4),
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of the whole sequence, and keywords. heads: of q, k, v, phi_q and phi_k."""
    rng = torch.Generator().manual_seed(0)
    rows = 2 if cu_seqlens is None else 1

    def normal(count: int, dim: int) -> Tensor:
        return torch.randn(rows, LENGTH, count, dim, generator=rng, dtype=torch.float64)

    inputs = {name: normal(n, dim) for name, n, dim in zip(("q", "k", "v"), heads, (6, 6, 5), strict=False)}
    inputs |= {name: normal(n, 3).square() for name, n in zip(("phi_q", "phi_k"), heads[3:], strict=True)}
    inputs["grad"] = normal(max(heads), 5)
    if factor:
        inputs["window_factor"] = torch.rand(max(heads), generator=rng, dtype=torch.float64) + 0.1
    if key_mask:
        inputs["key_mask"] = torch.rand(rows, LENGTH, generator=rng) > 0.4
    return inputs, {"window": window, "cu_seqlens": cu_seqlens} | options


def solve(attention: Callable[..., Tensor], inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Output and all gradients."""
    given = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items() if name != "grad"}
    output = attention(**given, **options)
    trained = {name: x for name, x in given.items() if x.requires_grad}
    grads = torch.autograd.grad(output, list(trained.values()), inputs["grad"])
    return {"output": output.detach()} | {f"d{name}": grad for name, grad in zip(trained, grads, strict=True)}
