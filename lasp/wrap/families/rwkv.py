"""RWKV-4 (arXiv:2305.13048)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lasp.functional.logcumsumexp import logcumsumexp
from lasp.wrap.family import Family
from lasp.wrap.stand_ins import previous, running_sum
from lasp.wrap.wiring import LayerCall


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
    steps = running_sum(call, torch.ones_like(k[..., :1]), torch.zeros_like(k[..., :1])) - 1  # tokens before, [B, T, 1]
    z = logcumsumexp(k + steps * w, **call.sequence)
    z = z - steps * w
    before = previous(call, torch.cat([z, torch.ones_like(z)], -1))
    z_before, exists = before.chunk(2, -1)
    z_before = z_before.masked_fill(exists == 0, -torch.inf)
    mean = running_sum(call, (k - z).exp() * v, (z_before - w - z).clamp(max=0))
    mean = previous(call, mean)
    output = mean + (u + k - z_before).sigmoid() * (v - mean)
    return output.to(value.dtype), None


FAMILIES = (
    Family(
        "rwkv",
        functions={"rwkv_linear_attention": wkv},
        methods={name: {"time_shift.forward": time_shift} for name in ("RwkvSelfAttention", "RwkvFeedForward")},
    ),
)
