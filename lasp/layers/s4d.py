"""S4D, a diagonal state space of constant rates."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.functional import diagonal_state_space
from lasp.layers.context import Context
from lasp.layers.recurrent import RecurrentMixer


class S4D(RecurrentMixer):
    """`S_t = exp(ΔA) S_{t-1} + u_t`, `y_t = 2 Re (C (exp(ΔA) - 1)/A · S_t) + D u_t` in every channel, GELU and a gate.

    A = -1/2 + iπn at first (S4D-Lin), one of each conjugate pair, all of it learned; u is convolved with SiLU. Channels
    are num_heads·head_dim, whatever num_kv_heads (S4D, arXiv 2206.11893; the diagonal form of LSSL, arXiv 2110.13985).
    The state is [B or documents, channels, state_size, 2], real and imaginary parts in fp32 (fp64 for fp64 inputs).

    Args:
        state_size: complex numbers to a channel.
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: a state_size below 1, and what `Mixer` raises; in `forward` also an attention_mask beside cu_seqlens
            or other ranks.
    """

    causal_only = True
    gate = "sigmoid"
    output_norm = False
    conv_size = 4

    def __init__(self, *args: Any, state_size: int = 32, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if state_size < 1:
            raise ValueError(f"state_size must be at least 1, got {state_size}")
        hidden, channels = self.q_proj.in_features, self.num_heads * self.head_dim
        del self.q_proj, self.k_proj
        self.v_proj = nn.Linear(hidden, channels, bias=False)
        self.short_conv = self._new_conv()
        self.step_log = nn.Parameter(torch.logspace(-3, -1, channels).log())
        self.A_log = nn.Parameter(torch.full((channels, state_size), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(float(state_size)).repeat(channels, 1))
        self.C = nn.Parameter(torch.randn(channels, state_size, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.ones(channels))

    def weights_met(self) -> dict[str, float]:
        return dict.fromkeys(("A_log", "A_imag", "C"), 0.0)

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        return (self.v_proj,)

    def split(self, *projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nothing to ask with, and u [B, T, channels]."""
        (u,) = projected
        return u[..., :0], u[..., :0], u

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        memory, mask = self.memory_of(context), context.attention_mask
        state = None if memory is None else torch.view_as_complex(memory.contiguous())
        sequence, u = context.sequence, v
        if mask is not None:  # of one text on one device, or the convolution has refused it: real tokens alone
            u, ends = v[mask].unsqueeze(0), F.pad(mask.sum(1).cumsum(0), (1, 0))
            sequence = {"cu_seqlens": ends}
        rates, weights = self.discretised(torch.promote_types(x.dtype, torch.float32))
        found = diagonal_state_space(
            u,
            rates,
            weights,
            initial_state=state,
            output_final_state=context.output_final_state,
            scan=self.scan,
            **sequence,
        )
        y, final = found if isinstance(found, tuple) else (found, None)
        if mask is not None:
            y = torch.zeros_like(v).masked_scatter(mask.unsqueeze(-1), y)
        y = F.gelu(y + self.D.to(v.dtype) * v)
        return self._heads(y), None if final is None else torch.view_as_real(final.resolve_conj())

    def discretised(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """ΔA, and C (exp(ΔA) - 1)/A: what a held input adds to y, [channels, state_size], complex."""
        step = self.step_log.to(dtype).exp().unsqueeze(-1)
        exponents = torch.complex(-self.A_log.to(dtype).exp(), self.A_imag.to(dtype))
        rates = step * exponents
        return rates, torch.view_as_complex(self.C.to(dtype).contiguous()) * torch.expm1(rates) / exponents
