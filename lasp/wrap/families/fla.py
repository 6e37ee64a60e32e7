"""Models of flash-linear-attention 0.6: what their layers call, over a group. Compared on stubs, not with its kernels.

Tensors are [B, T, H, D] and gates log decays. Each function takes the arguments of the one that it stands in for, after
what it knows of the sequence, cu_seqlens too; it returns the output and, in the place of a final state, None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.functional import causal_conv1d, linear_attention
from lasp.kernels.precision import compute_dtype
from lasp.wrap.family import Family
from lasp.wrap.model import loss
from lasp.wrap.stand_ins import gated_delta_rule
from lasp.wrap.swap import Function
from lasp.wrap.wiring import LayerCall, check_keywords

_MIXERS = {
    "GatedLinearAttention", "DeltaNet", "GatedDeltaNet", "KimiDeltaAttention", "MultiScaleRetention",
    "ShortConvolution", "RotaryEmbedding",
}  # fmt: skip
_TOKENWISE = {"RMSNorm", "LayerNorm", "FusedRMSNormGated", "FusedRMSNormSwishGate", "GatedMLP", "SwiGLULinear"}


def knows(cls: type) -> bool:
    """The layers, which all of its models share, stand in folders of their own."""
    return cls.__module__.startswith(("fla.layers.", "fla.modules.")) and cls.__name__ in _MIXERS | _TOKENWISE


def check_options(model: Any) -> None:
    """Raises ValueError for losses that `logits_and_loss` is not."""
    if getattr(model.config, "use_l2warp", False) or getattr(model, "criterion", None) is not None:
        raise ValueError(f"{type(model).__name__}: the loss is the cross-entropy, without use_l2warp or a criterion")


def logits_and_loss(
    call: LayerCall,
    model: Any,
    hidden_states: Tensor,
    labels: Tensor | None = None,
    logits_to_keep: int | None = 0,
    *,
    num_items_in_batch: Tensor | int | None = None,
    fuse_linear_cross_entropy: bool | None = None,
) -> tuple[Tensor | None, Tensor]:
    """`_compute_logits_and_loss` of every model, never fused; the labels come shifted."""
    logits = model.lm_head(hidden_states)
    if labels is None:
        return None, logits
    return loss(call.wiring, logits, labels, logits.shape[-1], num_items_in_batch, labels), logits


def gla(
    call: LayerCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    scale: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`chunk_gla` with g and `fused_recurrent_gla` with gk, [B, T, H, K]."""
    check_keywords("gated linear attention", others)
    gates = g if gk is None else gk
    assert gates is not None, "one of the two functions"
    log_decay = gates.to(compute_dtype(gates)).clamp(max=0)
    output = linear_attention(q.to(v.dtype), k.to(v.dtype), v, log_decay, scale=scale, **call.recurrence)
    return output, None


def retention(call: LayerCall, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
    """`chunk_retention`: head i keeps 1 - 2^(-5 - i) per token (arXiv:2307.08621, equation 8)."""
    heads = torch.arange(q.shape[2], dtype=compute_dtype(q), device=q.device)
    return gla(call, q, k, v, torch.log1p(-(2 ** (-5 - heads))), **options)


def delta(
    call: LayerCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`chunk_delta_rule`: no decay. beta [B, T, H]."""
    return gated_delta_rule(call, q, k, v, beta.new_zeros(beta.shape), beta, **options)


def gated_delta(
    call: LayerCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`chunk_gated_delta_rule` with g [B, T, H], `chunk_kda` with g [B, T, H, K]; beta [B, T, H]."""
    if use_gate_in_kernel:
        g = _gate(g, A_log, dt_bias, lower_bound)
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
    return gated_delta_rule(call, q, k, v, g, beta, **options)


def _gate(x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """The log decay from what a layer projects, [B, T, H] or [B, T, H, K]; A_log [H], dt_bias [H] or [H·K]."""
    x = x.to(compute_dtype(x))
    x = x if dt_bias is None else x + dt_bias.view(x.shape[2:])
    rate = 1.0 if A_log is None else A_log.to(x.dtype).exp().view(-1, *[1] * (x.dim() - 3))
    return -rate * F.softplus(x) if lower_bound is None else lower_bound * (rate * x).sigmoid()


def convolution(
    call: LayerCall,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
    cu_seqlens: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`causal_conv1d`. x [B, T, D], weight [D, W], bias [D]."""
    check_keywords("causal_conv1d", others)
    y = causal_conv1d(x, weight, bias, **call.sequence)
    return (y if activation is None else F.silu(y)), None


def short_convolution(
    call: LayerCall, module: Any, x: Tensor, mask: Tensor | None = None, **others: Any
) -> tuple[Tensor, None]:
    """`ShortConvolution.forward`. x [B, T, D], mask [B, T]."""
    x = x if mask is None else x * mask.unsqueeze(-1)
    return convolution(call, x, module.weight.squeeze(1), module.bias, module.activation, **others)


def rotation(
    call: LayerCall, module: Any, q: Tensor, k: Tensor, seqlen_offset: int = 0, max_seqlen: int | None = None
) -> tuple[Tensor, Tensor]:
    """`RotaryEmbedding.forward`, which counts from the first token that it is given. q, k [B, T, H, D]."""
    positions = call.known_cut.positions(q.device)
    if module.scale is not None or module.interleaved or seqlen_offset:
        raise ValueError("RotaryEmbedding: neither scale_base (xPos) nor interleaved pairs nor an offset are known")
    # Not from module.inv_freq, which a model in bf16 has rounded.
    steps = torch.arange(0, module.dim, 2, dtype=compute_dtype(q), device=q.device)
    angles = positions.to(steps).outer(1.0 / module.base ** (steps / module.dim)).unsqueeze(1)
    return _rotated(q, angles), _rotated(k, angles)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """x [B, T, H, D] with its first 2·R channels turned by angles [T, 1, R]."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    size = angles.shape[-1]
    a, b, rest = x.split([size, size, x.shape[-1] - 2 * size], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def not_unpadded(
    call: LayerCall, hidden_states: Tensor, cu_seqlens: Tensor | None, attention_mask: Tensor | None, q_len: int
) -> tuple[Tensor, None, Tensor | None]:
    """`unpad_hidden_states` would pack a rank's part as if it were the whole sequence."""
    if attention_mask is not None:
        raise ValueError("models of flash-linear-attention take no attention_mask here: pack documents, cu_seqlens")
    return hidden_states, None, cu_seqlens


def _family(folder: str, model: str, functions: Mapping[str, Function]) -> Family:
    return Family(
        f"fla.{folder}",
        {"causal_conv1d": convolution, "unpad_hidden_states": not_unpadded, **functions},
        methods={
            "ShortConvolution": {"forward": short_convolution},
            "RotaryEmbedding": {"forward": rotation},
            model: {"_compute_logits_and_loss": logits_and_loss},
        },
        model=model,
        knows=knows,
        check_options=check_options,
    )


FAMILIES = (
    _family("gla", "GLAForCausalLM", dict.fromkeys(("chunk_gla", "fused_chunk_gla", "fused_recurrent_gla"), gla)),
    _family(
        "retnet",
        "RetNetForCausalLM",
        dict.fromkeys(
            ("chunk_retention", "fused_chunk_retention", "parallel_retention", "fused_recurrent_retention"), retention
        ),
    ),
    _family(
        "delta_net", "DeltaNetForCausalLM", dict.fromkeys(("chunk_delta_rule", "fused_recurrent_delta_rule"), delta)
    ),
    _family(
        "gated_deltanet",
        "GatedDeltaNetForCausalLM",
        dict.fromkeys(("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"), gated_delta),
    ),
    _family("kda", "KDAForCausalLM", dict.fromkeys(("chunk_kda", "fused_recurrent_kda"), gated_delta)),
)
