"""Mamba-2, the state space duality layer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layers.context import Context
from lasp.layers.recurrent import RecurrentMixer


class Mamba2(RecurrentMixer):
    """`S_t = exp(-A Δ_t) S_{t-1} + B_t (Δ_t x_t)^T`, `y_t = S_t^T C_t + D x_t`: C, B and x are q, k and v.

    A short convolution with SiLU goes ahead, and a swish gate comes before the output norm, which is per head (Mamba-2,
    arXiv 2405.21060, section 7). num_kv_heads counts the groups of heads that share B and C; every head has a state.

    Args:
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: what `Mixer` raises.
    """

    causal_only = True
    gate = "silu"
    conv_size = 4
    scale = 1.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hidden, groups = self.q_proj.in_features, self.num_kv_heads * self.head_dim
        # The other way round than in attention: few queries and keys, many values.
        self.q_proj = nn.Linear(hidden, groups, bias=False)
        self.v_proj = nn.Linear(hidden, self.num_heads * self.head_dim, bias=False)
        self.short_conv = self._new_conv()
        self.dt_proj = nn.Linear(hidden, self.num_heads, bias=False)
        self.dt_bias = nn.Parameter(inverse_softplus(torch.logspace(-3, -1, self.num_heads)))
        self.A_log = nn.Parameter(torch.linspace(1, 16, self.num_heads).log())
        self.D = nn.Parameter(torch.ones(self.num_heads))

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        step, log_decay = softplus_gate(self.dt_proj(x), self.A_log, self.dt_bias)
        o, state = self.recur(q, k, v * step.unsqueeze(-1).to(v.dtype), log_decay, context)
        return o + self.D.to(v.dtype).unsqueeze(-1) * v, state

    def _output(self, x: Tensor, o: Tensor) -> Tensor:
        assert self.norm is not None, "Mamba-2 has an output norm"
        assert self.g_proj is not None, "and a gate"
        return self.out_proj(self.norm(o * F.silu(self._heads(self.g_proj(x)))).flatten(-2))


def softplus_gate(x: Tensor, a_log: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Step sizes `Δ = softplus(x + bias)` and log-decays `-exp(a_log)·Δ`, both at least fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    step = F.softplus(x.to(dtype) + bias.to(dtype))
    return step, -a_log.to(dtype).exp() * step


def inverse_softplus(x: Tensor) -> Tensor:
    """What softplus takes to x > 0."""
    return x + torch.log(-torch.expm1(-x))
