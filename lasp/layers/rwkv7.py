"""RWKV-7, a delta rule that reads with one key, erases with another and writes with a third."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lasp.functional import dplr_delta_rule
from lasp.layers.context import Context
from lasp.layers.deltanet import unit_length
from lasp.layers.recurrent import RecurrentMixer, skip_padding


class Rwkv7(RecurrentMixer):
    """`S_t = (diag(w_t) - (a_t·κ_t) κ_t^T) S_{t-1} + k_t v_t^T`, and a bonus for the token itself beside what it reads.

    w = exp(-e^(-1/2)·sigmoid(..)) and a = sigmoid(..) in every channel; κ is k times a learned vector, of length 1;
    what is written is k·(1 + (a - 1)·α) (RWKV-7, arXiv 2503.14456, section 4.1). Here a short convolution stands for
    the token shift, the output norm is an RMSNorm per head with a sigmoid gate, and values do not mix with those of
    the first layer.

    Args:
        gate_rank: rank of the projections behind w and a.
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: what `Mixer` raises; in `forward` also an attention_mask beside cu_seqlens or other ranks.
    """

    causal_only = True
    gate = "sigmoid"
    conv_size = 4
    scale = 1.0

    def __init__(self, *args: Any, gate_rank: int = 16, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hidden, width = self.q_proj.in_features, self.num_kv_heads * self.head_dim
        self.decay_proj = nn.Sequential(
            nn.Linear(hidden, gate_rank, bias=False), nn.Tanh(), nn.Linear(gate_rank, width)
        )
        self.rate_proj = nn.Sequential(nn.Linear(hidden, gate_rank, bias=False), nn.Linear(gate_rank, width))
        self.erase_scale = nn.Parameter(torch.full((self.num_kv_heads, self.head_dim), 0.85))
        self.write_scale = nn.Parameter(torch.ones(self.num_kv_heads, self.head_dim))
        self.bonus = nn.Parameter(torch.full((self.num_kv_heads, self.head_dim), 0.1))

    def weights_met(self) -> dict[str, float]:
        return dict.fromkeys(("erase_scale", "write_scale", "bonus"), 0.0)

    def log_decay(self, x: Tensor) -> Tensor:
        logits = self._heads(self.decay_proj(x)).to(torch.promote_types(x.dtype, torch.float32))
        return -math.exp(-0.5) * torch.sigmoid(logits)

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        rate = torch.sigmoid(self._heads(self.rate_proj(x)))
        read = unit_length(k * self.erase_scale.to(k.dtype))
        written = k * (1 + (rate - 1) * self.write_scale.to(k.dtype))
        if context.attention_mask is not None:
            rate, _ = skip_padding(rate, None, context.attention_mask)
        keys = {"read": read, "erase": rate * read}
        o, state = self.recur(q, written, v, self.log_decay(x), context, dplr_delta_rule, **keys)
        share = self.num_heads // self.num_kv_heads
        paired = (written * self.bonus.to(k.dtype)).repeat_interleave(share, 2)
        self_weight = torch.linalg.vecdot(q, paired).unsqueeze(-1)
        assert self.norm is not None, "RWKV-7 has an output norm"
        return self.norm(o) + self_weight * v.repeat_interleave(share, 2), state

    def _output(self, x: Tensor, o: Tensor) -> Tensor:
        assert self.g_proj is not None, "and a gate"
        return self.out_proj((o * torch.sigmoid(self._heads(self.g_proj(x)))).flatten(-2))
