"""The selective scan of Mamba, on one device or with the sequence cut over a group of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lasp.functional.channels import channel_results, own_channels, run_by_channels
from lasp.functional.checks import check_beside, check_documents, is_packed, ranks_of
from lasp.functional.heads import by_heads, check_deal
from lasp.functional.recurrence import by_document, check_options, plan_call
from lasp.kernels.arguments import check_flags, check_tensors
from lasp.kernels.precision import compute_dtype
from lasp.kernels.selective import CHUNK_SIZE, Selected, SelectiveScan
from lasp.kernels.values import check_values, may_look_at
from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.linear import Call, causal_recurrence
from lasp.parallel.scan import Heads, Scan, ScanName, check_scan
from lasp.parallel.untraced import outside


@outside
def selective_scan(
    u: Tensor,
    step: Tensor,
    rates: Tensor,
    key: Tensor,
    query: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    group: SequenceGroup | None = None,
    cut: Cut | None = None,
    scan: ScanName | Scan = "auto",
    chunk_size: int = CHUNK_SIZE,
) -> Tensor | tuple[Tensor, Tensor]:
    """`S_t = exp(step_t·A)·S_{t-1} + step_t·u_t·B_t` and `y_t = S_t·C_t` in every channel (Mamba, arXiv:2312.00752).

    u, step [B, T, I], step at least 0; rates (A) [I, N], at most 0; key (B), query (C) [B, T, N]. Decays and states of
    all tokens, [B, T, I, N], are never in memory at once: every chunk_size-th state is kept, and those between are
    computed again in backward. Over a group states cross, [B, I, N] of each rank, and forward their decays.

    Returns y [B, T, I] in u's dtype, and where asked the final states [B or documents, I, N], as initial_state, in fp32
    (fp64 for fp64 inputs). cu_seqlens, group, cut, scan, gradients and errors are as in `lasp.linear_attention`.
    """

    def check() -> Arguments:
        check_flags(output_final_state=output_final_state)
        said = check_options(None, scan, chunk_size, cut.group if cut else group) | {"final_state": output_final_state}
        bounds = check_documents(u, cu_seqlens, cut)
        return _check(Selected(u, step, key, query, rates), initial_state, bounds, said, ranks_of(group, cut))

    turn, packed = begin_call(group, "selective_scan", check, cut), is_packed(cu_seqlens, cut)
    state = None if initial_state is None else initial_state.unsqueeze(-1)
    if by_heads(turn, scan):
        own = own_channels(turn, rates)

        def again(u: Tensor, step: Tensor, key: Tensor, query: Tensor, **options: Any) -> Any:
            return selective_scan(u, step, own, key.squeeze(2), query.squeeze(2), chunk_size=chunk_size, **options)

        tensors = (u, step, key.unsqueeze(2), query.unsqueeze(2))
        return run_by_channels(turn, again, tensors, state, output_final_state)
    plan, runs = plan_call(turn, u.shape[1], packed)
    recurrence = SelectiveScan(runs, u.shape[2], scale=1.0, causal=True, chunk_size=chunk_size)
    call = Call(recurrence, plan, turn, check_scan(scan), output_final_state)
    state = by_document(state, u.shape[2], packed, compute_dtype(u))
    return channel_results(*causal_recurrence(call, state, Selected(u, step, key, query, rates)), packed)


def _check(
    inputs: Selected, state: Tensor | None, bounds: tuple[int, ...] | None, said: dict[str, Any], ranks: int
) -> Arguments:
    u, step, key, query, rates = inputs
    check_tensors(("initial_state",), **inputs._asdict(), initial_state=state)
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in inputs._asdict().items())
    if u.dim() != 3 or rates.dim() != 2 or step.shape != u.shape or key.shape != query.shape:
        raise ValueError(f"u and step must be [B, T, I], key and query [B, T, N], rates [I, N], got {shapes}")
    if key.shape != (*u.shape[:2], rates.shape[1]) or rates.shape[0] != u.shape[2] or min(u.shape[0], *rates.shape) < 1:
        raise ValueError(f"u and step must be [B, T, I], key and query [B, T, N], rates [I, N], got {shapes}")
    if not u.is_floating_point():
        raise ValueError(f"u must be floating, got {u.dtype}")
    for name, x in inputs._asdict().items():
        check_beside(name, x, u, "u")
    if state is not None:
        check_beside("initial_state", state, u, "u")
    rows = u.shape[0] if bounds is None else len(bounds) - 1
    if state is not None and state.shape != (rows, *rates.shape):
        raise ValueError(f"initial_state must be {[rows, *rates.shape]}, got {list(state.shape)}")
    if said["scan"] == Heads.name:
        check_deal(u.shape[2], ranks)
    if may_look_at(step):
        check_values(step >= 0, lambda: f"step must be >= 0, got a minimum of {step.min().item()}")
        check_values(rates <= 0, lambda: f"rates must be <= 0, got a maximum of {rates.max().item()}")
        check_values(step.isfinite().all() & rates.isfinite().all(), lambda: "step and rates must be finite, got inf")
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
