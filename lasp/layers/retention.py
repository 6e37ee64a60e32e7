"""Retention, the mixer of RetNet."""

from typing import Any

import torch
from torch import Tensor

from lasp.layers.recurrent import RecurrentMixer
from lasp.layers.rotary import Rotary


class Retention(RecurrentMixer):
    """Rotated queries and keys, one fixed decay per head, and a swish output gate.

    Head h = 0..H-1 forgets with `γ_h = 1 - 2^(-5-h)` per token (multi-scale retention of RetNet, arXiv 2307.08621),
    where H counts the key/value heads.

    Args:
        rope_theta: base of the rotary positions.
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: what `Mixer` and `Rotary` raise.
    """

    causal_only = True
    gate = "silu"

    def __init__(self, *args: Any, rope_theta: float = 10_000.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotary = Rotary(self.head_dim, rope_theta)

    def log_decay(self, x: Tensor) -> Tensor:
        # Computed, not a buffer: `.to(bfloat16)` would round a buffer, and loading on the meta device would lose it.
        heads = torch.arange(self.num_kv_heads, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        return torch.log1p(-torch.exp2(-5 - heads[self.own]))
