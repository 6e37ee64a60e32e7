"""Mamba (arXiv:2312.00752), by itself or with softmax attention."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lasp import functional
from lasp.kernels.precision import compute_dtype
from lasp.wrap.family import Family
from lasp.wrap.stand_ins import convolution, not_fused, step_sizes
from lasp.wrap.swap import Function
from lasp.wrap.wiring import LayerCall, check_keywords


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
    """`selective_scan_fn`. u, dt, z [B, I, T], A [I, N], B, C [B, N, T], D, delta_bias [I]; returns [B, I, T]."""
    check_keywords("the selective scan", others)
    step = step_sizes(dt, None if delta_bias is None else delta_bias.unsqueeze(-1), delta_softplus).mT
    dtype = compute_dtype(u)
    output = functional.selective_scan(
        u.to(dtype).mT,
        step.to(dtype).clamp(min=0),
        A.to(dtype).clamp(max=0),
        B.to(dtype).mT,
        C.to(dtype).mT,
        **call.recurrence,
    )
    assert isinstance(output, Tensor), "no final states"
    y = output.mT.to(u.dtype)
    y = y if D is None else y + u * D.unsqueeze(-1)
    return y if z is None else y * F.silu(z)


_FUNCTIONS: dict[str, Function] = {"causal_conv1d_fn": convolution, "mamba_selective_scan": selective_scan}
_FUSED = _FUNCTIONS | {"mamba_inner_fn": not_fused}

FAMILIES = (
    Family("mamba", _FUSED),
    Family("falcon_mamba", _FUSED),
    Family("jamba", _FUNCTIONS),
    Family(
        "zamba",
        _FUNCTIONS,
        tiny={
            "n_mamba_heads": 2, "num_hidden_layers": 4, "num_key_value_heads": 4, "attention_head_dim": 16,
            "attention_hidden_size": 64, "layers_block_type": ["linear_attention", "hybrid"] * 2,
        },
    ),
)  # fmt: skip
