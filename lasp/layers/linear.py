"""Basic linear attention."""

from typing import Any

from torch import Tensor

from lasp.layers.features import elu_plus_one
from lasp.layers.recurrent import RecurrentMixer
from lasp.layers.rotary import Rotary


class LinearAttention(RecurrentMixer):
    """Linear attention with the feature map elu + 1 on queries and keys, and no decay.

    "Transformers are RNNs" (arXiv 2006.16236, equation 7), with the output norm in the place of the denominator.

    Args:
        rope_theta: turns the features by rotary positions of this base (RoFormer, arXiv 2104.09864, equation 19), which
            a layer with causal=False needs to tell an order of tokens at all. None: no positions.
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: what `Mixer` and, with a rope_theta, `Rotary` raise.
    """

    def __init__(self, *args: Any, rope_theta: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if rope_theta is not None:
            self.rotary = Rotary(self.head_dim, rope_theta)

    def features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return elu_plus_one(q), elu_plus_one(k), v
