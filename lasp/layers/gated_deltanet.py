"""Gated DeltaNet."""

from typing import Any

import torch
from torch import Tensor, nn

from lasp.layers.deltanet import DeltaNet
from lasp.layers.mamba2 import inverse_softplus, softplus_gate


class GatedDeltaNet(DeltaNet):
    """DeltaNet with Mamba-2's decay per head and token, and a swish output gate (arXiv 2412.06464, section 3.4)."""

    gate = "silu"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.decay_proj = nn.Linear(self.q_proj.in_features, self.num_kv_heads, bias=False)
        self.dt_bias = nn.Parameter(inverse_softplus(torch.logspace(-3, -1, self.num_kv_heads)))
        self.A_log = nn.Parameter(torch.linspace(1, 16, self.num_kv_heads).log())

    def log_decay(self, x: Tensor) -> Tensor:
        return softplus_gate(self.decay_proj(x), self.A_log, self.dt_bias)[1]
