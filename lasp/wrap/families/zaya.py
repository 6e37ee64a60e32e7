"""ZAYA: compressed convolutional attention (arXiv:2510.04476)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d

from lasp.functional import causal_conv1d
from lasp.wrap.family import Family
from lasp.wrap.stand_ins import previous
from lasp.wrap.wiring import LayerCall


def compressed_convolution(
    call: LayerCall, module: Any, hidden_states: Tensor, past_key_values: None = None, conv_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """ZAYA's `ZayaCCAProjection.forward` (arXiv:2510.04476): two convolutions in a row, and half of v a token late."""
    if conv_mask is not None:
        hidden_states = hidden_states * conv_mask.unsqueeze(-1).to(hidden_states.dtype)
    heads, shared, dim = module.num_attention_heads, module.num_key_value_groups, module.head_dim
    queries, keys = module.q_proj(hidden_states), module.k_proj(hidden_states)
    mixed = causal_conv1d(torch.cat([queries, keys], -1), module.conv_qk_depthwise.weight.squeeze(1), **call.sequence)
    first, second = module.conv_qk_depthwise, module.conv_qk_grouped
    # The second convolution sees the first one's bias before the sequence begins, so that joins behind the halo.
    taps = [previous(call, mixed, i) if i else mixed for i in reversed(range(module.grouped_kernel_size))]
    stacked = torch.stack([tap + first.bias for tap in taps], -1).flatten(0, 1)
    mixed = conv1d(stacked, second.weight, second.bias, groups=second.groups).view(*hidden_states.shape[:2], -1)
    q, k = mixed.split([heads * dim, mixed.shape[-1] - heads * dim], -1)
    keys = keys.unflatten(-1, (-1, dim)).repeat_interleave(shared, 2)
    residual = (queries.unflatten(-1, (-1, dim)) + keys) * 0.5
    late, bias = module.v_proj_delayed(hidden_states), module.v_proj_delayed.bias
    late = previous(call, late) if bias is None else previous(call, late - bias) + bias
    value = torch.cat([module.v_proj_current(hidden_states), late], -1).unflatten(-1, (-1, dim))
    mean = residual.unflatten(2, (-1, shared)).mean(3)
    return q.unflatten(-1, (-1, dim)) + residual, k.unflatten(-1, (-1, dim)) + mean, value


FAMILIES = (
    Family(
        "zaya",
        methods={"ZayaCCAProjection": {"forward": compressed_convolution}},
        tiny={"num_experts_per_tok": 1},
    ),
)
