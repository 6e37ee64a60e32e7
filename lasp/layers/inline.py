"""InLine attention: linear attention whose weights sum to one by subtraction."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.layers.context import Context
from lasp.layers.recurrent import RecurrentMixer
from lasp.layers.state import State


class InLine(RecurrentMixer):
    """Weights `q·k_i - mean_i(q·k_i) + 1/t` over the t tokens seen, which may be negative and tell all queries apart.

    (Bridging the Divide: injective linear attention, arXiv 2412.06590, equation 6, here also causal.) With a 1 below
    each key and beside each value the state holds Σ k v^T, Σ k, Σ v and t; a query (q, 0) reads the first two and
    (0, 1) the others, two queries to a head.
    """

    output_norm = False
    scale = 1.0

    def features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = F.pad(q * self.head_dim**-0.5, (0, 1))
        ones = F.pad(torch.zeros_like(q[..., :-1]), (0, 1), value=1.0)
        return torch.stack([q, ones], 3).flatten(2, 3), F.pad(k, (0, 1), value=1.0), F.pad(v, (0, 1), value=1.0)

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, State | None]:
        o, state = super().mix(x, q, k, v, context)
        weighted, plain = o.unflatten(2, (-1, 2)).unbind(3)
        values, count = plain[..., :-1], plain[..., -1:].clamp(min=1)  # before any token but padding there is 0
        return weighted[..., :-1] + (1 - weighted[..., -1:]) * values / count, state
