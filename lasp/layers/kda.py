"""Kimi Delta Attention."""

from typing import Any

import torch
from torch import Tensor, nn

from lasp.layers.deltanet import DeltaNet
from lasp.layers.mamba2 import inverse_softplus, softplus_gate


class KimiDeltaAttention(DeltaNet):
    """DeltaNet with one decay per token and channel, and a sigmoid output gate (Kimi Linear, arXiv 2510.26692).

    The decays are `exp(-exp(A_log)·softplus(x W_1 W_2 + b))`, with A_log per head, b per channel and a narrow W_1 W_2.
    """

    gate = "sigmoid"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hidden, width = self.q_proj.in_features, self.num_kv_heads * self.head_dim
        self.decay_proj = nn.Sequential(
            nn.Linear(hidden, self.head_dim, bias=False), nn.Linear(self.head_dim, width, bias=False)
        )
        steps = torch.logspace(-3, -1, self.head_dim).repeat(self.num_kv_heads, 1)
        self.dt_bias = nn.Parameter(inverse_softplus(steps))
        self.A_log = nn.Parameter(torch.linspace(1, 16, self.num_kv_heads).log().unsqueeze(-1))

    def log_decay(self, x: Tensor) -> Tensor:
        return softplus_gate(self._heads(self.decay_proj(x)), self.A_log, self.dt_bias)[1]
