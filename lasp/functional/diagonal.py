"""Diagonal complex state spaces, on one device or with the sequence cut over a group of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lasp.functional.channels import channel_results, own_channels, run_by_channels
from lasp.functional.checks import check_documents, is_packed, ranks_of
from lasp.functional.heads import by_heads, check_deal
from lasp.functional.recurrence import check_options, plan_call
from lasp.kernels.arguments import check_flags, check_tensors
from lasp.kernels.diagonal import CHUNK_SIZE, DiagonalStateSpace, Driven
from lasp.kernels.precision import compute_dtype
from lasp.kernels.values import check_values, may_look_at
from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.linear import Call, causal_recurrence
from lasp.parallel.scan import Heads, Scan, ScanName, check_scan
from lasp.parallel.untraced import outside


@outside
def diagonal_state_space(
    u: Tensor,
    rates: Tensor,
    weights: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    group: SequenceGroup | None = None,
    cut: Cut | None = None,
    scan: ScanName | Scan = "auto",
    chunk_size: int = CHUNK_SIZE,
) -> Tensor | tuple[Tensor, Tensor]:
    """`S_t = exp(rates)·S_{t-1} + u_t` and `y_t = 2·Re sum_n weights_n·S_t` in every channel (S4D, arXiv:2206.11893).

    u [B, T, I]; rates [I, N], complex, with real parts of at most 0: the discretised exponents per token, of one of
    each conjugate pair; weights [I, N], complex: what writes and what reads, multiplied. In chunks of chunk_size tokens
    it is a convolution by fast Fourier transforms, between them and between ranks a recurrence: only complex states
    cross, [B, I, N] of each rank, for what a rank does to them follows from its number of tokens.

    Returns y [B, T, I] in u's dtype, and where asked the final states [B or documents, I, N], as initial_state, in
    complex64 (complex128 for fp64 inputs). cu_seqlens, group, cut, scan, gradients and errors are as in
    `lasp.linear_attention`; a scan that rounds on the wire is refused.
    """

    def check() -> Arguments:
        check_flags(output_final_state=output_final_state)
        said = check_options(None, scan, chunk_size, cut.group if cut else group) | {"final_state": output_final_state}
        bounds = check_documents(u, cu_seqlens, cut)
        if check_scan(scan).wire is not None:
            raise ValueError(f"complex states are not rounded on the wire, got scan {said['scan']}")
        return _check(Driven(u, rates, weights), initial_state, bounds, said, ranks_of(group, cut))

    turn, packed = begin_call(group, "diagonal_state_space", check, cut), is_packed(cu_seqlens, cut)
    dtype = torch.complex128 if compute_dtype(u) == torch.float64 else torch.complex64
    rates, weights = rates.to(dtype), weights.to(dtype)
    state = None if initial_state is None else initial_state.to(dtype).unsqueeze(-1)
    if by_heads(turn, scan):
        own = own_channels(turn, rates), own_channels(turn, weights)

        def again(u: Tensor, **options: Any) -> Any:
            return diagonal_state_space(u, *own, chunk_size=chunk_size, **options)

        return run_by_channels(turn, again, (u,), state, output_final_state)
    plan, runs = plan_call(turn, u.shape[1], packed)
    recurrence = DiagonalStateSpace(runs, u.shape[2], scale=1.0, causal=True, chunk_size=chunk_size)
    call = Call(recurrence, plan, turn, check_scan(scan), output_final_state)
    by_document = None if state is None else state.unsqueeze(1 if packed else 0)
    return channel_results(*causal_recurrence(call, by_document, Driven(u, rates, weights)), packed)


def _check(
    inputs: Driven, state: Tensor | None, bounds: tuple[int, ...] | None, said: dict[str, Any], ranks: int
) -> Arguments:
    u, rates, weights = inputs
    check_tensors(("initial_state",), **inputs._asdict(), initial_state=state)
    shapes = f"u {list(u.shape)}, rates {list(rates.shape)}, weights {list(weights.shape)}"
    if u.dim() != 3 or rates.dim() != 2 or rates.shape != weights.shape or rates.shape[0] != u.shape[2]:
        raise ValueError(f"u must be [B, T, I], rates and weights [I, N], got {shapes}")
    if min(u.shape[0], *rates.shape) < 1:
        raise ValueError(f"batch, channels and states must be at least 1, got {shapes}")
    if not (u.is_floating_point() and rates.is_complex() and weights.is_complex()):
        raise ValueError(
            f"u must be floating, rates and weights complex, got {u.dtype}, {rates.dtype}, {weights.dtype}"
        )
    if any(x is not None and x.device != u.device for x in (rates, weights, state)):
        raise ValueError(f"rates, weights and initial_state must be on the device of u, {u.device}")
    rows = u.shape[0] if bounds is None else len(bounds) - 1
    if state is not None and (state.shape != (rows, *rates.shape) or not state.is_complex()):
        told = f"{state.dtype} {list(state.shape)}"
        raise ValueError(f"initial_state must be complex {[rows, *rates.shape]}, got {told}")
    if said["scan"] == Heads.name:
        check_deal(u.shape[2], ranks)
    if may_look_at(rates):
        check_values(rates.real <= 0, lambda: f"rates must not grow, got a real part of {rates.real.max().item()}")
    tensors = [*inputs] if state is None else [*inputs, state]
    fields = said | {
        "device": u.device.type,
        "batch": u.shape[0],
        "dims": list(rates.shape),
        "dtype": str(u.dtype),
        "initial_state": state is not None,
        "backward": torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
    }
    return Arguments(fields, u.shape[1], bounds)
