"""Gated linear attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layers.recurrent import RecurrentMixer


class GatedLinearAttention(RecurrentMixer):
    """One learned decay per token and channel, `sigmoid(x W_1 W_2 + b)^(1/16)`, and a swish output gate.

    (GLA, arXiv 2312.06635, section 4.4; here keys are as wide as values.)

    Args:
        gate_rank: rank of the gate's projection W_1 W_2.
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: what `Mixer` raises.
    """

    causal_only = True
    gate = "silu"

    def __init__(self, *args: Any, gate_rank: int = 16, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        width = self.num_kv_heads * self.head_dim
        self.decay_proj = nn.Sequential(
            nn.Linear(self.q_proj.in_features, gate_rank, bias=False), nn.Linear(gate_rank, width)
        )

    def log_decay(self, x: Tensor) -> Tensor:
        logits = self._heads(self.decay_proj(x))
        return F.logsigmoid(logits.to(torch.promote_types(x.dtype, torch.float32))) / 16
