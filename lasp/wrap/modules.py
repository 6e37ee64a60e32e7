"""Modules of Hugging Face models that mix tokens in code of their own, with nothing to swap but a method.

Each takes what it knows of the sequence, the module, and the arguments of the method that it stands in for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, logsigmoid

from lasp.functional import causal_conv1d, linear_attention
from lasp.functional.logcumsumexp import logcumsumexp
from lasp.kernels.precision import compute_dtype
from lasp.parallel.sharding import shard, unshard
from lasp.wrap.wiring import LayerCall, check_keywords


def lightning(
    call: LayerCall,
    module: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """MiniMax-01's `forward` (arXiv:2501.08313): a decay per head, and a norm over all heads behind it."""
    check_keywords(type(module).__name__, others)
    qkv = module.act_fn(module.qkv_proj(hidden_states))
    if attention_mask is not None:
        qkv = (qkv * attention_mask.unsqueeze(-1)).to(qkv.dtype)
    q, k, v = qkv.unflatten(2, (module.num_attention_heads, 3, module.head_dim)).unbind(3)
    output = linear_attention(q, k, v, -module.slope_rate.flatten(), scale=1.0, **call.recurrence)
    return module.out_proj(module.output_gate(hidden_states).sigmoid() * module.norm(output.flatten(2))), None


def rg_lru(
    call: LayerCall,
    module: nn.Module,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """RecurrentGemma's `_rnn_scan` (arXiv:2402.19427): `h_t = a_t·h_{t-1} + x_t` in every channel, forgotten at reset.

    hidden_states, recurrent_gate [B, T, D], reset [B, T, 1]. Every channel is a head whose keys are 1.
    """
    dtype = compute_dtype(hidden_states)
    gate = recurrent_gate.to(dtype).clamp(torch.finfo(dtype).tiny, 1).log().masked_fill(reset, -torch.inf)
    return _running(call, hidden_states.to(dtype), gate).to(hidden_states.dtype), None


def _running(call: LayerCall, x: Tensor, log_decay: Tensor) -> Tensor:
    """`h_t = exp(log_decay_t)·h_{t-1} + x_t` of x, log_decay [B, T, D]."""
    ones = x.new_ones(*x.shape[:2], 1, 1)
    output = linear_attention(ones, ones, x.unsqueeze(-1), log_decay, scale=1.0, **call.recurrence)
    return output.squeeze(-1)


def depthwise(call: LayerCall, module: nn.Conv1d, x: Tensor) -> Tensor:
    """A depthwise `nn.Conv1d` whose caller drops what its padding adds at the end. x [B, D, T]."""
    y = causal_conv1d(x.mT, module.weight.squeeze(1), module.bias, **call.sequence)
    return y.mT


def previous(call: LayerCall, x: Tensor, steps: int = 1) -> Tensor:
    """The token `steps` before each, [B, T, D]; 0 before a document's first."""
    weight = x.new_zeros(x.shape[2], steps + 1)
    weight[:, 0] = 1
    return causal_conv1d(x, weight, **call.sequence)


def time_shift(call: LayerCall, module: nn.Module, x: Tensor) -> Tensor:
    """RWKV's `ZeroPad2d((0, 0, 1, -1))`. x [B, T, D]."""
    return previous(call, x)


def wkv(
    call: LayerCall,
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: None = None,
    return_state: bool = False,
) -> tuple[Tensor, None]:
    """`rwkv_linear_attention` (RWKV-4, arXiv:2305.13048, eq. 16); time_decay, time_first [D], key, value [B, T, D].

    With `z_t = log sum_{i <= t} exp(k_i - (t - i)·w)` the numerator over the denominator is a running mean `m` whose
    decay `exp(z_{t-1} - w - z_t)` and input `exp(k_t - z_t)` sum to 1; the token itself joins with its bonus.
    """
    k, v, w, u = (x.double() for x in (key, value, time_decay.exp(), time_first))  # k + t·w grows with the sequence
    steps = _running(call, torch.ones_like(k[..., :1]), torch.zeros_like(k[..., :1])) - 1  # tokens before, [B, T, 1]
    z = logcumsumexp(k + steps * w, **call.sequence)
    z = z - steps * w
    before = previous(call, torch.cat([z, torch.ones_like(z)], -1))
    z_before, exists = before.chunk(2, -1)
    z_before = z_before.masked_fill(exists == 0, -torch.inf)
    mean = _running(call, (k - z).exp() * v, (z_before - w - z).clamp(max=0))
    mean = previous(call, mean)
    output = mean + (u + k - z_before).sigmoid() * (v - mean)
    return output.to(value.dtype), None


def mlstm(
    call: LayerCall,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    igate: Tensor,
    fgate: Tensor,
    **states: Any,
) -> tuple[Tensor, None]:
    """xLSTM's backend (arXiv:2405.04517, equations 19 to 27). query, key [B, H, T, K], value [B, H, T, V], gates
    [B, H, T] before their exponential and sigmoid; returns [B, H, T, V].

    The running maximum that stabilises is not affine: the gates of the whole sequence, two numbers per token and head,
    are gathered, and every rank runs over them. The normaliser is one more value.
    """
    check_keywords(type(module).__name__, states)
    if call.packed:
        raise ValueError("mLSTM takes no packed documents")
    dtype = compute_dtype(query)
    gates = unshard(torch.stack([igate, logsigmoid(fgate)]).movedim(-1, 1).double(), **call.ranks)  # [2, N, B, H]
    total = gates[1].cumsum(0)
    highest = total + (gates[0] - total).cummax(0).values.clamp(min=0)  # the state before the first token counts as 0
    kept = (gates[1] + nn.functional.pad(highest, (0, 0, 0, 0, 1, -1)) - highest).clamp(max=0)
    log_decay, log_input, highest = (
        shard(x, dim=0, **call.ranks).movedim(0, 1).to(dtype) for x in (kept, gates[0] - highest, highest)
    )
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
    v = nn.functional.pad(v, (0, 1), value=1.0) * log_input.exp().unsqueeze(-1)
    output = linear_attention(q, k, v, log_decay, **call.recurrence)
    h, norm = output[..., :-1], output[..., -1:]
    h = h / (torch.maximum(norm.abs(), (-highest).exp().unsqueeze(-1)) + module.config.eps)
    return h.transpose(1, 2).to(value.dtype), None


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


# By class, and by what is replaced: a method, or `child.method`.
METHODS: dict[str, dict[str, Callable[..., Any]]] = {
    "MiniMaxLightningAttention": {"forward": lightning},
    "RecurrentGemmaRglru": {"_rnn_scan": rg_lru},
    "RecurrentGemmaRecurrentBlock": {"conv_1d.forward": depthwise},
    "RwkvSelfAttention": {"time_shift.forward": time_shift},
    "RwkvFeedForward": {"time_shift.forward": time_shift},
    "xLSTMBackend": {"forward": mlstm},
    "ZayaCCAProjection": {"forward": compressed_convolution},
}
