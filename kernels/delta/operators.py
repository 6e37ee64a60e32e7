"""Launching the delta family's own Triton kernels. Conventions as in `lasp.kernels.decay.operators`."""

from __future__ import annotations

import torch
from torch import Tensor

from lasp.kernels.decay.operators import launch, numerics, operator, sized, sizes, tiles
from lasp.kernels.delta import triton as kernels


@operator
def solve(
    k: Tensor, v: Tensor, beta: Tensor, sums: Tensor | None, chunks: Tensor, heads: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of each chunk's system [B, T, H, size], U [B, T, H, V] and W [B, T, H, K]; beta [B, T, HB]."""
    inverse, written, erased = _solved(k, v, beta, sums, chunks, heads, size)
    constants = sizes(k, k, v, sums, heads, v.shape[3], size) | {"HB": beta.shape[2]} | numerics(k.dtype)
    tile = sized(kernels.solve, constants)
    tensors = (k, v, beta, sums, torch.empty_like(inverse), inverse, written, erased, chunks)
    grid = (len(chunks), k.shape[0] * heads)
    launch(kernels.solve, tile, grid, tensors, k.shape[1], **constants)
    return inverse, written, erased


@solve.register_fake
def _solved(
    k: Tensor, v: Tensor, beta: Tensor, sums: Tensor | None, chunks: Tensor, heads: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = k.shape[:2]
    inverse = k.new_empty((*tokens, heads, size), dtype=torch.float32)
    return (
        inverse,
        v.new_empty((*tokens, heads, v.shape[3]), dtype=torch.float32),
        k.new_empty((*tokens, heads, k.shape[3])),
    )


@operator
def grad_solve(
    inverse: Tensor, beta: Tensor, grad_written: Tensor, error: Tensor, chunks: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of each state's values [B, T, H, V] and rates [B, T, H, 1]. error: [B, T, H, V]."""
    batch, length, heads, value_dim = error.shape
    constants = {"HB": beta.shape[2], "H": heads, "V": value_dim, "K": value_dim, "C": inverse.shape[3]}
    constants |= numerics(grad_written.dtype)
    tile = sized(kernels.grad_solve, constants)
    dv = torch.empty_like(error)
    dbeta = error.new_empty((tiles(value_dim, tile.value), batch, length, heads, 1), dtype=torch.float32)
    grid = (len(dbeta) * len(chunks), batch * heads)
    tensors = (inverse, beta, grad_written, error, dv, dbeta, chunks)
    launch(kernels.grad_solve, tile, grid, tensors, batch, length, **constants)
    return dv, dbeta.sum(0)


@grad_solve.register_fake
def _(inverse: Tensor, beta: Tensor, grad_written: Tensor, error: Tensor, chunks: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(error), error.new_empty((*error.shape[:3], 1), dtype=torch.float32)
