"""RecurrentGemma (arXiv:2402.19427): gated linear recurrences and local attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lasp.functional import causal_conv1d
from lasp.kernels.precision import compute_dtype
from lasp.wrap.family import Family
from lasp.wrap.stand_ins import running_sum
from lasp.wrap.wiring import LayerCall


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
    return running_sum(call, hidden_states.to(dtype), gate).to(hidden_states.dtype), None


def depthwise(call: LayerCall, module: nn.Conv1d, x: Tensor) -> Tensor:
    """A depthwise `nn.Conv1d` whose caller drops what its padding adds at the end. x [B, D, T]."""
    y = causal_conv1d(x.mT, module.weight.squeeze(1), module.bias, **call.sequence)
    return y.mT


FAMILIES = (
    Family(
        "recurrent_gemma",
        methods={
            "RecurrentGemmaRglru": {"_rnn_scan": rg_lru},
            "RecurrentGemmaRecurrentBlock": {"conv_1d.forward": depthwise},
        },
        tiny={"num_hidden_layers": 3},
    ),
)
