"""Mamba-2 (arXiv:2405.21060), by itself or with softmax attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lasp.functional import linear_attention
from lasp.kernels.precision import compute_dtype
from lasp.wrap.family import Family
from lasp.wrap.stand_ins import convolution, not_fused, step_sizes
from lasp.wrap.swap import Function
from lasp.wrap.wiring import LayerCall, check_keywords


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
    """`mamba_chunk_scan_combined`. x [B, T, H, P], dt [B, T, H], A, D, dt_bias [H], B, C [B, T, G, N]; computed in
    fp32. Returns [B, T, H, P]."""
    check_keywords("the state-space scan", others)
    dtype = compute_dtype(x)
    x, B, C = x.to(dtype), B.to(dtype), C.to(dtype)
    step = step_sizes(dt, dt_bias, dt_softplus).clamp(*dt_limit).to(dtype)
    decay = (A.to(dtype) * step).clamp(max=0)
    output = linear_attention(C, B, x * step.unsqueeze(-1), decay, scale=1.0, **call.recurrence)
    return output if D is None else output + D.unsqueeze(-1) * x


_FUNCTIONS: dict[str, Function] = {
    "causal_conv1d_fn": convolution,
    "mamba2_chunk_scan": chunk_scan,
    "mamba2_split_conv1d_scan_combined": not_fused,
}

FAMILIES = (
    Family("bamba", _FUNCTIONS, tiny={"attn_layer_indices": [1]}),
    Family("falcon_h1", _FUNCTIONS),
    Family("granitemoehybrid", _FUNCTIONS, tiny={"layer_types": ["linear_attention", "full_attention"]}),
    Family("mamba2", _FUNCTIONS, tiny={"num_heads": 4, "head_dim": 16, "n_groups": 2}),
    Family("nemotron_h", _FUNCTIONS, tiny={"n_groups": 2}),
    Family(
        "zamba2",
        _FUNCTIONS,
        tiny={
            "num_mem_blocks": 1, "hybrid_layer_ids": [1, 3], "num_hidden_layers": 4, "num_key_value_heads": 4,
            "attention_head_dim": 16, "attention_hidden_size": 64,
            "layers_block_type": ["linear_attention", "hybrid"] * 2,
        },
    ),
)  # fmt: skip
