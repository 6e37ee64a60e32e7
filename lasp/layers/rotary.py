"""Rotary positions, for every mixer that turns its queries and keys."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Turns queries and keys by angles that grow with their positions (RoFormer, arXiv 2104.09864).

    A product of a turned query and a turned key depends on the difference of their positions alone. Nothing is learned
    or kept, so no length is too long.

    Args:
        head_dim: D, even; pairs (x_i, x_{i + D/2}) turn together.
        theta: base of the wavelengths; pair i turns by `theta^(-2i/D)` radians per token.

    Raises:
        ValueError: an odd head_dim, a theta that is not positive.
    """

    head_dim: int
    theta: float

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"rotary positions turn pairs: head_dim must be even, got {self.head_dim}")
        if self.theta <= 0:
            raise ValueError(f"rope_theta must be positive, got {self.theta}")

    def __call__(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """q [B, T, H, D] and k [B, T, H_kv, D] of tokens at position_ids [B or 1, T], turned, dtypes kept."""
        # fp64 angles: at position 2 million an fp32 angle is off by a tenth of a radian.
        pairs = torch.arange(0, self.head_dim, 2, device=q.device, dtype=torch.float64)
        angles = position_ids[..., None, None] * self.theta ** (-pairs / self.head_dim)
        dtype = torch.promote_types(q.dtype, torch.float32)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return _turned(q, cos, sin), _turned(k, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Computed in the dtype of cos and sin [B or 1, T, 1, D / 2], returned in x's."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
