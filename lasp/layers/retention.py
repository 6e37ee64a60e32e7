"""Retention, the mixer of RetNet."""

from typing import Any

import torch
from torch import Tensor

from lasp.layers.mixer import Mixer


class Retention(Mixer):
    """Rotated queries and keys, one fixed decay per head, and a swish output gate.

    Head h = 0..H-1 forgets with `γ_h = 1 - 2^(-5-h)` per token (multi-scale retention of RetNet, arXiv 2307.08621),
    where H counts the key/value heads. Positions enter by rotation alone, so only their differences matter.

    Args:
        rope_theta: base of the rotation's wavelengths; pair i of D/2 turns by `rope_theta^(-2i/D)` radians per token.
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: an odd head_dim, a rope_theta that is not positive; and what `Mixer` raises.
    """

    needs_positions = True
    gate = "silu"

    def __init__(self, *args: Any, rope_theta: float = 10_000.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.head_dim % 2:
            raise ValueError(f"Retention rotates pairs: head_dim must be even, got {self.head_dim}")
        if rope_theta <= 0:
            raise ValueError(f"rope_theta must be positive, got {rope_theta}")
        self.rope_theta = rope_theta

    def features(self, q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        assert position_ids is not None, "Mixer.forward provides positions where needs_positions is set"
        cos, sin = rotation(position_ids, self.head_dim, self.rope_theta, torch.promote_types(q.dtype, torch.float32))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def log_decay(self, x: Tensor) -> Tensor:
        # Computed, not a buffer: `.to(bfloat16)` would round a buffer, and loading on the meta device would lose it.
        heads = torch.arange(self.num_kv_heads, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        return torch.log1p(-torch.exp2(-5 - heads))


def rotation(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles (RoFormer, arXiv 2104.09864): each [B, T, 1, head_dim / 2] of `dtype`.

    The angles are fp64: at position 2 million an fp32 angle is off by a tenth of a radian.
    """
    pairs = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float64)
    angles = position_ids[..., None, None] * theta ** (-pairs / head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + D/2}) of x [B, T, H, D]; computed in the dtype of cos and sin, returned in x's."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
