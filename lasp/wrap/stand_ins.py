"""What stands in for recurrences and convolutions that several families share, over a group.

Each takes the arguments of the function that it stands in for, after what is known of the sequence.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lasp.functional import causal_conv1d, delta_rule, linear_attention
from lasp.kernels.precision import compute_dtype
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


def running_sum(call: LayerCall, x: Tensor, log_decay: Tensor) -> Tensor:
    """`h_t = exp(log_decay_t)·h_{t-1} + x_t` of x, log_decay [B, T, D]: every channel is a head whose keys are 1."""
    ones = x.new_ones(*x.shape[:2], 1, 1)
    output = linear_attention(ones, ones, x.unsqueeze(-1), log_decay, scale=1.0, **call.recurrence)
    return output.squeeze(-1)


def previous(call: LayerCall, x: Tensor, steps: int = 1) -> Tensor:
    """The token `steps` before each, [B, T, D]; 0 before a document's first."""
    weight = x.new_zeros(x.shape[2], steps + 1)
    weight[:, 0] = 1
    return causal_conv1d(x, weight, **call.sequence)


def step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """Those of a state-space model's discretisation, from what it projects."""
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


def not_fused(call: LayerCall, *_: Any, **__: Any) -> None:
    """The kernels that do a whole Mamba block at once: without them the block takes its steps one by one."""
