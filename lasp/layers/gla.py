"""Gated linear attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layers.recurrent import RecurrentMixer


class GatedLinearAttention(RecurrentMixer):
    """One learned decay per token and channel, `sigmoid(x W_1 W_2 + b)^(1/16)`, and a swish output gate.

    (GLA, arXiv 2312.06635, section 4.4.)

    Args:
        gate_rank: rank of the gate's projection W_1 W_2.
        expand_k: width of queries, keys and decays as a share of head_dim, the values'; 0.5 in the paper, and half the
            state.
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: an expand_k that makes no whole number of channels; what `Mixer` raises.
    """

    causal_only = True
    gate = "silu"

    def __init__(self, *args: Any, gate_rank: int = 16, expand_k: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.head_dim * expand_k < 1 or self.head_dim * expand_k % 1:
            raise ValueError(f"expand_k must make whole channels of head_dim {self.head_dim}, got {expand_k}")
        self.key_dim = int(self.head_dim * expand_k)
        hidden, width = self.q_proj.in_features, self.num_kv_heads * self.key_dim
        self.q_proj = nn.Linear(hidden, self.num_heads * self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden, width, bias=False)
        self.decay_proj = nn.Sequential(nn.Linear(hidden, gate_rank, bias=False), nn.Linear(gate_rank, width))

    def split(self, *projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = projected
        return q.unflatten(-1, (-1, self.key_dim)), k.unflatten(-1, (-1, self.key_dim)), self._heads(v)

    def log_decay(self, x: Tensor) -> Tensor:
        logits = self.decay_proj(x).unflatten(-1, (-1, self.key_dim))
        return F.logsigmoid(logits.to(torch.promote_types(x.dtype, torch.float32))) / 16
