"""Launching Triton's kernels: operators that torch.compile knows by their shapes alone.

Sizes come from the tensors: q [B, T, HQ, K], k [B, T, HK, K], v [B, T, HV, V], running sums of log-decays [B, T, HG, 1
or K], states [slots, B, H, K, V]. All results are new tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from lasp.kernels.chunks import ceil_div
from lasp.kernels.gpu import decay, delta
from lasp.kernels.gpu.tuning import Tiling, Work, tiling
from lasp.kernels.operators import operator


class Setting(NamedTuple):
    """What the kernels of a call share.

    sums: of log-decays, None without decay; chunks, segments: the integers of `table.py`; heads: of states; scale: of
    the queries; size: tokens to a chunk. causal: queries see inside their chunk; strict: but not themselves. trained:
    whether log-decays have a gradient.
    """

    sums: Tensor | None
    chunks: Tensor
    segments: Tensor
    heads: int
    scale: float
    size: int
    causal: bool
    strict: bool
    trained: bool

    def constants(self, q: Tensor, k: Tensor, v: Tensor | None, value_dim: int) -> dict[str, Any]:
        """What kernels are compiled for: heads of the tensors, of the output (HO) and states (H), dims, and C tokens.

        WIDE, which only tilings depend on: whether values are longer than keys.
        """
        heads, sums = self.heads, self.sums
        numbers = {"HQ": q.shape[2], "HK": k.shape[2], "HV": heads if v is None else v.shape[2], "H": heads}
        gates = 0 if sums is None else 1 if sums.shape[3] == 1 else 2
        numbers |= {"HG": heads if sums is None else sums.shape[2], "HO": max(heads, q.shape[2]), "GATES": gates}
        numbers |= {"WIDE": v is not None and v.dtype != k.dtype}
        numbers |= {"K": k.shape[3], "V": value_dim, "C": self.size}
        return numbers | numerics(k.dtype)


def numerics(dtype: torch.dtype) -> dict[str, Any]:
    """The dtype and the precision of products, for inputs of a dtype.

    bf16 has the range of fp32 and goes as it is; what stays in fp32 beside it takes tf32, which cuts digits that bf16
    does not have. fp16 has not that range, and states outgrow it: like fp32 it takes three products of tf32, which
    keep all but the last bits.
    """
    if dtype == torch.bfloat16:
        return {"OPERAND": tl.bfloat16, "PRECISION": "tf32"}
    return {"OPERAND": tl.float32, "PRECISION": "tf32x3"}


# The decay family's, and what both families share -------------------------------------------------------------------


@operator
def sum_gates(log_decay: Tensor, chunks: Tensor, size: int) -> Iterator[Tensor]:
    """The running sums of log-decays [B, T, H, D] within each chunk, in fp32."""
    batch, length, heads, dim = log_decay.shape
    sums = torch.empty_like(log_decay, dtype=torch.float32)
    yield sums
    constants = {"H": heads, "D": dim, "C": size, "K": dim, "V": dim}
    tile = sized(decay.sum_gates, constants)
    grid = (ceil_div(dim, tile.key) * len(chunks), batch * heads)
    launch(decay.sum_gates, tile, grid, (log_decay, sums, chunks), length, **constants)


@operator
def carry(
    k: Tensor, v: Tensor | None, erased: Tensor | None, starts: Tensor | None, setting: Setting, value_dim: int,
    store: bool, exact: bool,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Carry states through segments: those that enter chunks (store), what tokens write (delta), those at the ends.

    exact: products of fp32 operands even where the inputs are shorter.
    """
    states, written, ends = _carried(k, v, erased, setting, value_dim, store)
    yield states, written, ends
    constants = setting.constants(k, k, v, value_dim)
    constants |= numerics(torch.float32) if exact else {}
    flags = {"DELTA": erased is not None, "VALUES": v is not None, "STORE": store}
    tile = sized(decay.carry, constants, whole_keys=erased is not None)
    starts = torch.zeros_like(ends) if starts is None else starts
    tensors = (k, v, setting.sums, erased, starts, states, written, ends, setting.chunks, setting.segments)
    launch(decay.carry, tile, _carriers(ends, tile), tensors, *k.shape[:2], **constants, **flags)


@operator
def carry_back(
    q: Tensor, k: Tensor, grad: Tensor, erased: Tensor | None, grad_written: Tensor | None, starts: Tensor | None,
    setting: Setting, store: bool,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Carry gradients of states back: those that leave chunks (store), of what tokens write, those at the starts."""
    states, written, ends = _carried(k, grad_written, erased, setting, grad.shape[3], store)
    yield states, written, ends
    constants = setting.constants(q, k, None, grad.shape[3])
    flags = {"DELTA": erased is not None, "STORE": store}
    tile = sized(decay.carry_back, constants, whole_keys=erased is not None)
    starts = torch.zeros_like(ends) if starts is None else starts
    table = setting.chunks, setting.segments
    tensors = (q, k, grad, setting.sums, erased, grad_written, starts, states, written, ends, *table)
    numbers = (*k.shape[:2], setting.scale)
    launch(decay.carry_back, tile, _carriers(ends, tile), tensors, *numbers, **constants, **flags)


def _carried(
    k: Tensor, like: Tensor | None, erased: Tensor | None, setting: Setting, value_dim: int, store: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what the two above return; empty tensors for what is not asked for."""
    shape = (k.shape[0], setting.heads, k.shape[3], value_dim)
    states = k.new_empty((setting.chunks.shape[0] if store else 0, *shape), dtype=torch.float32)
    tokens = k.shape[1] if store and erased is not None else 0
    written = (k if like is None else like).new_empty((k.shape[0], tokens, setting.heads, value_dim))
    return states, written, k.new_empty((setting.segments.shape[0], *shape), dtype=torch.float32)


def _carriers(ends: Tensor, tile: Tiling) -> tuple[int, int, int]:
    """The programs that carry states [segments, B, H, K, V]."""
    segments, batch, heads, key_dim, value_dim = ends.shape
    return segments, ceil_div(key_dim, tile.key) * ceil_div(value_dim, tile.value), batch * heads


@operator
def attend(
    q: Tensor, k: Tensor, v: Tensor, states: Tensor | None, before: Tensor | None, setting: Setting, inside: bool,
    dtype: torch.dtype,
) -> Iterator[Tensor]:  # fmt: skip
    """Outputs [B, T, HO, V]: from inside the chunks, from the states that enter them, and `before` if it is given."""
    heads = max(setting.heads, q.shape[2])
    output = v.new_empty((*q.shape[:2], heads, v.shape[3]), dtype=dtype)
    yield output
    constants = setting.constants(q, k, v, v.shape[3])
    flags = {"STRICT": setting.strict, "INSIDE": inside, "READ": states is not None, "ADD": before is not None}
    tile = sized(decay.attend, constants)
    grid = (ceil_div(v.shape[3], tile.value) * len(setting.chunks), q.shape[0] * heads)
    tensors = (q, k, v, setting.sums, states, before, output, setting.chunks)
    launch(decay.attend, tile, grid, tensors, *q.shape[:2], setting.scale, **constants, **flags)


@operator
def grad_values(
    q: Tensor, k: Tensor, grad: Tensor, grad_states: Tensor | None, setting: Setting, inside: bool, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Gradients of each state's values [B, T, H, V]: from inside the chunks, and from gradients that leave them."""
    dv = grad.new_empty((*q.shape[:2], setting.heads, grad.shape[3]), dtype=dtype)
    yield dv
    constants = setting.constants(q, k, None, grad.shape[3])
    tile = sized(decay.grad_values, constants)
    grid = (ceil_div(grad.shape[3], tile.value) * len(setting.chunks), q.shape[0] * setting.heads)
    flags = {"INSIDE": inside, "CARRIED": grad_states is not None}
    tensors = (q, k, grad, setting.sums, grad_states, dv, setting.chunks)
    launch(decay.grad_values, tile, grid, tensors, *q.shape[:2], setting.scale, **constants, **flags)


@operator
def grad_keys(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None, states: Tensor | None, grad_states: Tensor | None,
    setting: Setting, dtype: torch.dtype,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Gradients of queries [B, T, HO, K], of each state's keys [B, T, H, K] and (trained) gates [B, T, H, 1 or K].

    grad: of the output, for what queries see inside their chunk and read of `states`; grad_states: those that leave
    the chunks, for what keys carry to the end. Empty tensors for what is not asked for.
    """
    tokens, heads, sums = q.shape[:2], setting.heads, setting.sums
    dq = q.new_empty((*tokens, max(heads, q.shape[2]) if grad is not None else 0, k.shape[3]), dtype=dtype)
    dk = k.new_empty((*tokens, heads, k.shape[3]), dtype=dtype)
    channels = sums.shape[3] if setting.trained and sums is not None else 0
    dgates = k.new_empty((*tokens, heads, channels), dtype=torch.float32)
    yield dq, dk, dgates
    constants = setting.constants(q, k, v, v.shape[3])
    tile = sized(decay.grad_keys, constants)
    across = ceil_div(k.shape[3], tile.key)
    parts = _parts(dgates, across if constants["GATES"] == 1 else 1)
    flags = {"STRICT": setting.strict, "INSIDE": setting.causal and grad is not None, "READ": grad is not None}
    flags |= {"CARRIED": grad_states is not None, "TRAINED": setting.trained}
    tensors = (q, k, v, grad, sums, states, grad_states, dq, dk, parts, setting.chunks)
    grid = (across * len(setting.chunks), q.shape[0] * heads)
    launch(decay.grad_keys, tile, grid, tensors, *tokens, setting.scale, **constants, **flags)
    _sum_parts(parts, dgates)


# The delta family's own ---------------------------------------------------------------------------------------------


@operator
def solve(k: Tensor, v: Tensor, beta: Tensor, setting: Setting) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The inverse of each chunk's system [B, T, H, size], U [B, T, H, V] and W [B, T, H, K]; beta [B, T, HB]."""
    tokens, heads = k.shape[:2], setting.heads
    inverse = k.new_empty((*tokens, heads, setting.size), dtype=torch.float32)
    written = v.new_empty((*tokens, heads, v.shape[3]), dtype=torch.float32)
    erased = k.new_empty((*tokens, heads, k.shape[3]))
    yield inverse, written, erased
    constants = setting.constants(k, k, v, v.shape[3]) | {"HB": beta.shape[2]}
    tile = sized(delta.solve, constants)
    room = torch.empty_like(inverse)
    tensors = (k, v, beta, setting.sums, room, inverse, written, erased, setting.chunks)
    launch(delta.solve, tile, (len(setting.chunks), k.shape[0] * heads), tensors, k.shape[1], **constants)


@operator
def grad_solve(
    inverse: Tensor, beta: Tensor, grad_written: Tensor, error: Tensor, chunks: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """The gradients of each state's values [B, T, H, V] and rates [B, T, H, 1]. error: [B, T, H, V]."""
    batch, length, heads, value_dim = error.shape
    dv = torch.empty_like(error)
    dbeta = error.new_empty((batch, length, heads, 1), dtype=torch.float32)
    yield dv, dbeta
    constants = {"HB": beta.shape[2], "H": heads, "V": value_dim, "K": value_dim, "C": inverse.shape[3]}
    constants |= numerics(grad_written.dtype)
    tile = sized(delta.grad_solve, constants)
    parts = _parts(dbeta, ceil_div(value_dim, tile.value))
    grid = (len(parts) * len(chunks), batch * heads)
    tensors = (inverse, beta, grad_written, error, dv, parts, chunks)
    launch(delta.grad_solve, tile, grid, tensors, batch, length, **constants)
    _sum_parts(parts, dbeta)


# Launching ----------------------------------------------------------------------------------------------------------


MOST_PROGRAMS = 65535
"""CUDA's limit for all dimensions of a grid but the first."""

MOST_REGISTERS = 255
"""What a thread can have."""


def _parts(total: Tensor, count: int) -> Tensor:
    """Room for what so many programs add to a result; the result itself where it is one."""
    return total.unsqueeze(0) if count == 1 else total.new_empty((count, *total.shape))


def _sum_parts(parts: Tensor, total: Tensor) -> None:
    if len(parts) > 1:
        torch.sum(parts, 0, out=total)


def sized(kernel: Any, constants: dict[str, Any], whole_keys: bool = False) -> Tiling:
    """The tiling of a kernel for its constants."""
    wide, short = constants.get("WIDE", False), constants.get("OPERAND") != tl.float32
    gates = constants.get("GATES", 0)
    return tiling(Work(kernel.__name__, constants["K"], constants["V"], gates, whole_keys, wide, short))


def launch(
    kernel: Any, tile: Tiling, grid: Sequence[int], tensors: Sequence[Tensor | None], *numbers: float, **constants: Any
) -> None:
    """Run a kernel on its tensors' device; one of them stands in for each that there is none of.

    Constants that a kernel has no use for are left out. Raises ValueError where a card has too few places.
    """
    if grid[-1] > MOST_PROGRAMS:
        raise ValueError(
            f"Triton's kernels take at most {MOST_PROGRAMS} heads x batch, got {grid[-1]}; backend='torch' takes any"
        )
    some = next(x for x in tensors if x is not None)
    constants |= {"BK": tile.key, "BV": tile.value}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if kernel in (decay.carry, decay.carry_back):  # few programs at once; the assembler would save and spill
        options["maxnreg"] = MOST_REGISTERS
    arguments = [some if x is None else x for x in tensors]
    if 0 in grid:
        return
    with torch.cuda.device(some.device) if some.is_cuda else nullcontext():
        kernel[tuple(grid)](*arguments, *numbers, **constants, **options)
