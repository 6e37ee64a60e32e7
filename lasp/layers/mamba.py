"""Mamba, the selective state space layer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.functional import selective_scan
from lasp.kernels.chunks import ceil_div
from lasp.layers.context import Context
from lasp.layers.mamba2 import inverse_softplus
from lasp.layers.recurrent import RecurrentMixer


class Mamba(RecurrentMixer):
    """`S_t = exp(-A Δ_t) S_{t-1} + Δ_t u_t B_t`, `y_t = S_t·C_t + D u_t` in every channel, with a swish gate.

    u is convolved with SiLU, and B, C and Δ are projections of it; channels are num_heads·head_dim, and all share B and
    C, whatever num_kv_heads (Mamba, arXiv 2312.00752, section 3). A state is [B or documents, channels, state_size, 1].

    Args:
        state_size: of each channel.
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: a state_size below 1, and what `Mixer` raises.
    """

    causal_only = True
    gate = "silu"
    output_norm = False
    conv_size = 4

    def __init__(self, *args: Any, state_size: int = 16, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if state_size < 1:
            raise ValueError(f"state_size must be at least 1, got {state_size}")
        hidden, channels = self.q_proj.in_features, self.num_heads * self.head_dim
        self.v_proj = nn.Linear(hidden, channels, bias=False)
        self.q_proj = nn.Linear(channels, state_size, bias=False)
        self.k_proj = nn.Linear(channels, state_size, bias=False)
        self.short_conv = self._new_conv()
        self.dt_proj = nn.Sequential(
            nn.Linear(channels, ceil_div(hidden, 16), bias=False), nn.Linear(ceil_div(hidden, 16), channels, bias=False)
        )
        self.dt_bias = nn.Parameter(inverse_softplus(torch.logspace(-3, -1, channels)))
        self.A_log = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))

    def weights_met(self) -> dict[str, float]:
        return dict.fromkeys(("A_log",), 0.0)

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        return (self.v_proj,)

    def split(self, *projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """C and B [B, T, state_size], and u [B, T, channels]."""
        (u,) = projected
        return self.q_proj(u), self.k_proj(u), u

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        memory = self.memory_of(context)
        dtype = torch.promote_types(x.dtype, torch.float32)
        step = F.softplus(self.dt_proj(v).to(dtype) + self.dt_bias.to(dtype))
        if context.attention_mask is not None:
            step = step.masked_fill(~context.attention_mask.unsqueeze(-1), 0)
        found = selective_scan(
            v,
            step,
            -self.A_log.to(dtype).exp(),
            k,
            q,
            initial_state=None if memory is None else memory.squeeze(-1),
            output_final_state=context.output_final_state,
            scan=self.scan,
            **context.sequence,
        )
        y, state = found if isinstance(found, tuple) else (found, None)
        return self._heads(y + self.D.to(v.dtype) * v), None if state is None else state.unsqueeze(-1)
