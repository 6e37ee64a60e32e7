"""sLSTM, the scalar memory of xLSTM, which reads its own output."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.functional import slstm
from lasp.layers.context import Context
from lasp.layers.recurrent import RecurrentMixer


class SLstm(RecurrentMixer):
    """`c_t = f c_{t-1} + i z`, `n_t = f n_{t-1} + i`, `h_t = o c_t / n_t` in every channel; h_{t-1} joins all gates.

    i = exp(..), f = sigmoid(..), z = tanh(..), o = sigmoid(..). Both h_{t-1} and x, which joins behind a short
    convolution with SiLU, are mixed within heads (xLSTM, arXiv 2405.04517, equations 8 to 18). It is no scan: ranks
    wait for one another, and work at the same time only on different sequences of the batch (docs/mixers.md). Channels
    are num_heads·head_dim, whatever num_kv_heads; the state is [B or documents, H, D, 4].

    Args:
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: what `Mixer` raises; in `forward` also an attention_mask beside cu_seqlens or other ranks.
    """

    causal_only = True
    conv_size = 4

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hidden, channels = self.q_proj.in_features, self.num_heads * self.head_dim
        del self.q_proj, self.k_proj
        self.v_proj = nn.Linear(hidden, channels, bias=False)
        self.short_conv = self._new_conv()
        size = 4, self.num_heads, self.head_dim, self.head_dim
        self.enters = nn.Parameter(torch.randn(size) * self.head_dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(4, self.num_heads, self.head_dim))
        self.recurrent = nn.Parameter(torch.zeros(size))
        with torch.no_grad():
            self.bias[2] = torch.linspace(3, 6, self.head_dim)  # of what is remembered

    def weights_met(self) -> dict[str, float]:
        return dict.fromkeys(("recurrent", "bias"), 0.0)

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        return (self.v_proj,)

    def split(self, *projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nothing to ask with, and the gates [B, T, 4, H, D]."""
        (u,) = projected
        gates = torch.einsum("bthd,ghde->btghe", self._heads(u), self.enters.to(u.dtype)) + self.bias.to(u.dtype)
        return u[..., :0], u[..., :0], gates

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        mask, gates, sequence = context.attention_mask, v, context.sequence
        if mask is not None:  # of one text on one device, or the convolution has refused it: real tokens alone
            gates, sequence = gates[mask].unsqueeze(0), {"cu_seqlens": F.pad(mask.sum(1).cumsum(0), (1, 0))}
        found = slstm(
            gates,
            self.recurrent,
            initial_state=self.memory_of(context),
            output_final_state=context.output_final_state,
            **sequence,
        )
        h, state = found if isinstance(found, tuple) else (found, None)
        if mask is not None:
            h = torch.zeros_like(v[:, :, 0]).masked_scatter(mask[..., None, None], h)
        return h, state
