"""Basic linear attention."""

from typing import Any

from torch import Tensor

from lasp.layers.features import feature_map as find_map
from lasp.layers.recurrent import RecurrentMixer
from lasp.layers.rotary import Rotary


class LinearAttention(RecurrentMixer):
    """Linear attention with a feature map on queries and keys, and no decay.

    By default "Transformers are RNNs" (arXiv 2006.16236, equation 7), with the output norm in the place of the
    denominator.

    Args:
        feature_map: a name in `lasp.layers.features.FEATURE_MAPS`; queries and keys each have their own parameters.
        normalise: divides by q·Σk in the place of the output norm (arXiv 2006.16236, equation 9).
        rope_theta: turns the features by rotary positions of this base (RoFormer, arXiv 2104.09864, equation 19), which
            a layer with causal=False needs to tell an order of tokens at all. None: no positions.
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: an unknown feature map, normalise with one whose dot products may be negative, as they are after
            a rotation; what `Mixer` and, with a rope_theta, `Rotary` raise.
    """

    def __init__(
        self,
        *args: Any,
        feature_map: str = "elu",
        normalise: bool = False,
        rope_theta: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        kind = find_map(feature_map)
        if normalise and (rope_theta is not None or not kind.positive):
            raise ValueError(
                f"normalise divides by sums that must not be negative, got feature_map {feature_map!r} and"
                f" rope_theta {rope_theta}"
            )
        self.q_features = kind.build(self.num_heads, self.head_dim)
        self.k_features = kind.build(self.num_kv_heads, self.head_dim)
        if normalise:
            self.normalise, self.norm = True, None
        if rope_theta is not None:
            self.rotary = Rotary(self.head_dim, rope_theta)

    def features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_features(q), self.k_features(k), v
