"""Launching the decay family's Triton kernels: operators that torch.compile knows by their shapes alone.

Every operator has a fake and no derivative: that lives in `lasp.parallel.linear`. Sizes come from the tensors: q [B, T,
HQ, K], k [B, T, HK, K], v [B, T, HV, V], running sums of log-decays [B, T, HG, 1 or K], states [slots, B, H, K, V]; the
integers of `chunks` and `segments` are those of `table.py`. size: tokens of a chunk. All results are new tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from lasp.kernels.decay import triton as kernels
from lasp.kernels.tuning import Tiling, Work, tiling


def operator(function: Callable[..., Any]) -> Any:
    return torch.library.custom_op(f"lasp::{function.__name__}", function, mutates_args=())


def numerics(dtype: torch.dtype) -> dict[str, Any]:
    """The dtype and the precision of products, for inputs of a dtype.

    bf16 has the range of fp32 and goes as it is; what stays in fp32 beside it takes tf32, which cuts digits that bf16
    does not have. fp16 has not that range, and states outgrow it: like fp32 it takes three products of tf32, which
    keep all but the last bits.
    """
    if dtype == torch.bfloat16:
        return {"OPERAND": tl.bfloat16, "PRECISION": "tf32"}
    return {"OPERAND": tl.float32, "PRECISION": "tf32x3"}


def sizes(
    q: Tensor, k: Tensor, v: Tensor | None, sums: Tensor | None, heads: int, value_dim: int, size: int
) -> dict[str, Any]:
    """What kernels are compiled for: heads of the tensors, of the output (HO) and states (H), dims, and C tokens.

    WIDE, which only tilings depend on: whether values are longer than keys.
    """
    numbers = {"HQ": q.shape[2], "HK": k.shape[2], "HV": heads if v is None else v.shape[2], "H": heads}
    gates = 0 if sums is None else 1 if sums.shape[3] == 1 else 2
    numbers |= {"HG": heads if sums is None else sums.shape[2], "HO": max(heads, q.shape[2]), "GATES": gates}
    numbers |= {"WIDE": v is not None and v.dtype != k.dtype}
    return numbers | {"K": k.shape[3], "V": value_dim, "C": size, "LEVELS": size.bit_length() - 1}


MOST_PROGRAMS = 65535
"""CUDA's limit for all dimensions of a grid but the first."""

MOST_REGISTERS = 255
"""What a thread can have."""


def tiles(size: int, tile: int) -> int:
    """How many tiles of a size it takes."""
    return -(-size // tile)


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
    if kernel in (kernels.carry, kernels.carry_back):  # few programs at once; the assembler would save and spill
        options["maxnreg"] = MOST_REGISTERS
    arguments = [some if x is None else x for x in tensors]
    if 0 in grid:
        return
    with torch.cuda.device(some.device) if some.is_cuda else nullcontext():
        kernel[tuple(grid)](*arguments, *numbers, **constants, **options)


def sized(kernel: Any, constants: dict[str, Any], whole_keys: bool = False) -> Tiling:
    """The tiling of a kernel for its constants."""
    wide, short = constants.get("WIDE", False), constants.get("OPERAND") != tl.float32
    gates = constants.get("GATES", 0)
    return tiling(Work(kernel.__name__, constants["K"], constants["V"], gates, whole_keys, wide, short))


@operator
def sum_gates(log_decay: Tensor, chunks: Tensor, size: int) -> Tensor:
    """The running sums of log-decays [B, T, H, D] within each chunk, in fp32."""
    batch, length, heads, dim = log_decay.shape
    sums = torch.empty_like(log_decay, dtype=torch.float32)
    constants = {"H": heads, "D": dim, "C": size, "K": dim, "V": dim}
    tile = sized(kernels.sum_gates, constants)
    grid = (tiles(dim, tile.key) * len(chunks), batch * heads)
    launch(kernels.sum_gates, tile, grid, (log_decay, sums, chunks), length, **constants)
    return sums


@sum_gates.register_fake
def _(log_decay: Tensor, chunks: Tensor, size: int) -> Tensor:
    return torch.empty_like(log_decay, dtype=torch.float32)


@operator
def carry(
    k: Tensor, v: Tensor | None, sums: Tensor | None, erased: Tensor | None, starts: Tensor | None, chunks: Tensor,
    segments: Tensor, heads: int, value_dim: int, size: int, store: bool, exact: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Carry states through segments: those that enter chunks (store), what tokens write (delta), those at the ends.

    exact: products of fp32 operands even where the inputs are shorter.
    """
    states, written, ends = _carried(k, v, erased, chunks, segments, heads, value_dim, store)
    starts = torch.zeros_like(ends) if starts is None else starts
    constants = sizes(k, k, v, sums, heads, value_dim, size) | numerics(torch.float32 if exact else k.dtype)
    flags = {"DELTA": erased is not None, "VALUES": v is not None, "STORE": store}
    tile = sized(kernels.carry, constants, whole_keys=erased is not None)
    grid = (len(segments), tiles(k.shape[3], tile.key) * tiles(value_dim, tile.value), k.shape[0] * heads)
    tensors = (k, v, sums, erased, starts, states, written, ends, chunks, segments)
    launch(kernels.carry, tile, grid, tensors, k.shape[0], k.shape[1], **constants, **flags)
    return states, written, ends


@carry.register_fake
def _(
    k: Tensor, v: Tensor | None, sums: Tensor | None, erased: Tensor | None, starts: Tensor | None, chunks: Tensor,
    segments: Tensor, heads: int, value_dim: int, size: int, store: bool, exact: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _carried(k, v, erased, chunks, segments, heads, value_dim, store)


@operator
def carry_back(
    q: Tensor, k: Tensor, grad: Tensor, sums: Tensor | None, erased: Tensor | None, grad_written: Tensor | None,
    starts: Tensor | None, chunks: Tensor, segments: Tensor, heads: int, scale: float, size: int, store: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Carry gradients of states back: those that leave chunks (store), of what tokens write, those at the starts."""
    value_dim = grad.shape[3]
    states, written, ends = _carried(k, grad_written, erased, chunks, segments, heads, value_dim, store)
    starts = torch.zeros_like(ends) if starts is None else starts
    constants = sizes(q, k, None, sums, heads, value_dim, size) | numerics(k.dtype)
    flags = {"DELTA": erased is not None, "STORE": store}
    tile = sized(kernels.carry_back, constants, whole_keys=erased is not None)
    grid = (len(segments), tiles(k.shape[3], tile.key) * tiles(value_dim, tile.value), k.shape[0] * heads)
    tensors = (q, k, grad, sums, erased, grad_written, starts, states, written, ends, chunks, segments)
    numbers = (*k.shape[:2], scale)
    launch(kernels.carry_back, tile, grid, tensors, *numbers, **constants, **flags)
    return states, written, ends


@carry_back.register_fake
def _(
    q: Tensor, k: Tensor, grad: Tensor, sums: Tensor | None, erased: Tensor | None, grad_written: Tensor | None,
    starts: Tensor | None, chunks: Tensor, segments: Tensor, heads: int, scale: float, size: int, store: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _carried(k, grad_written, erased, chunks, segments, heads, grad.shape[3], store)


def _carried(
    k: Tensor, like: Tensor | None, erased: Tensor | None, chunks: Tensor, segments: Tensor, heads: int,
    value_dim: int, store: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Memory for what the two above return; empty tensors for what is not asked for."""
    shape = (k.shape[0], heads, k.shape[3], value_dim)
    states = k.new_empty((chunks.shape[0] if store else 0, *shape), dtype=torch.float32)
    tokens = k.shape[1] if store and erased is not None else 0
    written = (k if like is None else like).new_empty((k.shape[0], tokens, heads, value_dim))
    return states, written, k.new_empty((segments.shape[0], *shape), dtype=torch.float32)


@operator
def attend(
    q: Tensor, k: Tensor, v: Tensor, sums: Tensor | None, states: Tensor | None, before: Tensor | None, chunks: Tensor,
    heads: int, scale: float, size: int, inside: bool, strict: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Outputs [B, T, HO, V]: from inside the chunks, from the states that enter them, and `before` if it is given."""
    output = _output(q, v, heads, dtype)
    constants = sizes(q, k, v, sums, heads, v.shape[3], size) | numerics(k.dtype)
    flags = {"STRICT": strict, "INSIDE": inside, "READ": states is not None, "ADD": before is not None}
    tile = sized(kernels.attend, constants)
    grid = (tiles(v.shape[3], tile.value) * len(chunks), q.shape[0] * constants["HO"])
    tensors = (q, k, v, sums, states, before, output, chunks)
    launch(kernels.attend, tile, grid, tensors, *q.shape[:2], scale, **constants, **flags)
    return output


@attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, sums: Tensor | None, states: Tensor | None, before: Tensor | None, chunks: Tensor,
    heads: int, scale: float, size: int, inside: bool, strict: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return _output(q, v, heads, dtype)


def _output(q: Tensor, v: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    return v.new_empty((*q.shape[:2], max(heads, q.shape[2]), v.shape[3]), dtype=dtype)


@operator
def grad_values(
    q: Tensor, k: Tensor, grad: Tensor, sums: Tensor | None, grad_states: Tensor | None, chunks: Tensor, heads: int,
    scale: float, size: int, inside: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Gradients of each state's values [B, T, H, V]: from inside the chunks, and from gradients that leave them."""
    dv = grad.new_empty((*q.shape[:2], heads, grad.shape[3]), dtype=dtype)
    constants = sizes(q, k, None, sums, heads, grad.shape[3], size) | numerics(k.dtype)
    tile = sized(kernels.grad_values, constants)
    grid = (tiles(grad.shape[3], tile.value) * len(chunks), q.shape[0] * heads)
    flags = {"INSIDE": inside, "CARRIED": grad_states is not None}
    tensors = (q, k, grad, sums, grad_states, dv, chunks)
    launch(kernels.grad_values, tile, grid, tensors, *q.shape[:2], scale, **constants, **flags)
    return dv


@grad_values.register_fake
def _(
    q: Tensor, k: Tensor, grad: Tensor, sums: Tensor | None, grad_states: Tensor | None, chunks: Tensor, heads: int,
    scale: float, size: int, inside: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return grad.new_empty((*q.shape[:2], heads, grad.shape[3]), dtype=dtype)


@operator
def grad_keys(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None, sums: Tensor | None, states: Tensor | None,
    grad_states: Tensor | None, chunks: Tensor, heads: int, scale: float, size: int, inside: bool, strict: bool,
    trained: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries [B, T, HO, K], of each state's keys [B, T, H, K] and (trained) gates [B, T, H, 1 or K].

    grad: of the output, for what queries see inside their chunk and read of `states`; grad_states: those that leave
    the chunks, for what keys carry to the end.
    """
    constants = sizes(q, k, v, sums, heads, v.shape[3], size) | numerics(k.dtype)
    tile = sized(kernels.grad_keys, constants)
    parts = tiles(k.shape[3], tile.key) if constants["GATES"] == 1 else 1
    dq, dk, dgates = _key_grads(q, k, grad, sums, heads, trained, dtype, parts)
    grid = (tiles(k.shape[3], tile.key) * len(chunks), q.shape[0] * heads)
    flags = {"STRICT": strict, "INSIDE": inside, "READ": grad is not None, "CARRIED": grad_states is not None}
    flags |= {"TRAINED": trained}
    tensors = (q, k, v, grad, sums, states, grad_states, dq, dk, dgates, chunks)
    launch(kernels.grad_keys, tile, grid, tensors, *q.shape[:2], scale, **constants, **flags)
    return dq, dk, dgates[0] if parts == 1 else dgates.sum(0)


@grad_keys.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None, sums: Tensor | None, states: Tensor | None,
    grad_states: Tensor | None, chunks: Tensor, heads: int, scale: float, size: int, inside: bool, strict: bool,
    trained: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dgates = _key_grads(q, k, grad, sums, heads, trained, dtype, 1)
    return dq, dk, dgates[0]


def _key_grads(
    q: Tensor, k: Tensor, grad: Tensor | None, sums: Tensor | None, heads: int, trained: bool, dtype: torch.dtype,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Memory for the above; empty tensors for what is not asked for."""
    tokens = q.shape[:2]
    dq = q.new_empty((*tokens, max(heads, q.shape[2]) if grad is not None else 0, k.shape[3]), dtype=dtype)
    dk = k.new_empty((*tokens, heads, k.shape[3]), dtype=dtype)
    channels = sums.shape[3] if trained and sums is not None else 0
    return dq, dk, k.new_empty((parts, *tokens, heads, channels), dtype=torch.float32)
