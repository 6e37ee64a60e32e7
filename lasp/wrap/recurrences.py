"""Recurrences and convolutions of Hugging Face models: the functions that their mixers call, over a group.

Each takes the arguments of the function of transformers that it stands in for, after what it knows of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lasp.functional import causal_conv1d, delta_rule, linear_attention
from lasp.kernels.precision import compute_dtype
from lasp.wrap.modules import wkv
from lasp.wrap.wiring import LayerCall, check_keywords


def convolution(
    call: LayerCall, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **others: Any
) -> Tensor:
    """`causal_conv1d_fn`. x [B, D, T], weight [D, W], bias [D]; returns [B, D, T]."""
    from transformers.activations import ACT2FN

    check_keywords("causal_conv1d_fn", others)
    y = causal_conv1d(x.to(weight.dtype).mT, weight, bias, **call.sequence)
    return (y if activation is None else ACT2FN[activation](y)).mT.to(x.dtype)


def gated_delta_rule(
    call: LayerCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    use_qk_l2norm_in_kernel: bool = False,
    **others: Any,
) -> tuple[Tensor, None]:
    """`chunk_gated_delta_rule` and `chunk_kda`. query, key [B, T, Hk, K], value [B, T, H, V], beta [B, T, H], g: log
    decay [B, T, H] or [B, T, H, K]; computed in fp32. Returns the output [B, T, H, V]."""
    check_keywords("the delta rule", others)
    q, k, v, gates, rates = (x.to(compute_dtype(query)) for x in (query, key, value, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    output = delta_rule(q, k, v, rates, gates.clamp(max=0), **call.recurrence)
    return output.to(query.dtype), None


def _step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


def chunk_scan(
    call: LayerCall,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **others: Any,
) -> Tensor:
    """`mamba_chunk_scan_combined` (Mamba-2). x [B, T, H, P], dt [B, T, H], A, D, dt_bias [H], B, C [B, T, G, N];
    computed in fp32. Returns [B, T, H, P]."""
    check_keywords("the state-space scan", others)
    dtype = compute_dtype(x)
    x, B, C = x.to(dtype), B.to(dtype), C.to(dtype)
    step = _step_sizes(dt, dt_bias, dt_softplus).clamp(*dt_limit).to(dtype)
    decay = (A.to(dtype) * step).clamp(max=0)
    output = linear_attention(C, B, x * step.unsqueeze(-1), decay, scale=1.0, **call.recurrence)
    return output if D is None else output + D.unsqueeze(-1) * x


def selective_scan(
    call: LayerCall,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    **others: Any,
) -> Tensor:
    """`selective_scan_fn` (Mamba-1). u, dt, z [B, I, T], A [I, N], B, C [B, N, T], D, delta_bias [I]; returns
    [B, I, T]. Every channel is a head of one value and a decay per state: `linear_attention` with V = 1."""
    check_keywords("the selective scan", others)
    step = _step_sizes(dt, None if delta_bias is None else delta_bias.unsqueeze(-1), delta_softplus).mT
    dtype = compute_dtype(u)
    q, k = (x.to(dtype).mT.unsqueeze(2) for x in (C, B))
    v = (step * u.mT).to(dtype).unsqueeze(-1)
    decay = (step.unsqueeze(-1) * A).to(dtype).clamp(max=0)
    output = linear_attention(q, k, v, decay, scale=1.0, **call.recurrence)
    y = output.squeeze(-1).mT.to(u.dtype)
    y = y if D is None else y + u * D.unsqueeze(-1)
    return y if z is None else y * F.silu(z)


def not_fused(call: LayerCall, *_: Any, **__: Any) -> None:
    """The kernels that do a whole Mamba block at once: without them the block takes its steps one by one."""


# By the name that the modeling files call them by.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": convolution,
    "torch_chunk_gated_delta_rule": gated_delta_rule,
    "chunk_kimi_delta_attention": gated_delta_rule,
    "mamba2_chunk_scan": chunk_scan,
    "mamba_selective_scan": selective_scan,
    "rwkv_linear_attention": wkv,
    "mamba2_split_conv1d_scan_combined": not_fused,
    "mamba_inner_fn": not_fused,
}
