"""Based: linear attention with the Taylor map."""

from typing import Any

from torch import Tensor, nn

from lasp.layers.features import taylor
from lasp.layers.recurrent import RecurrentMixer


class Based(RecurrentMixer):
    """Taylor features of narrow queries and keys, divided by q·Σk.

    The features' products are 1 + s + s²/2 > 0. Based (arXiv 2402.18668) has such layers beside softmax attention over
    a short window: `["based", "softmax"]` with `mixer_options={"softmax": {"window": 64}}`.

    Args:
        feature_dim: width of queries and keys; they become 1 + feature_dim + feature_dim² features.
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: what `Mixer` raises.
    """

    output_norm = False
    normalise = True
    scale = 1.0

    def __init__(self, *args: Any, feature_dim: int = 16, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.feature_dim = feature_dim
        hidden = self.q_proj.in_features
        self.q_proj = nn.Linear(hidden, self.num_heads * feature_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * feature_dim, bias=False)

    def split(self, *projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = projected
        q, k = (x.unflatten(-1, (-1, self.feature_dim)) for x in (q, k))
        return q, k, self._heads(v)

    def features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return taylor(q), taylor(k), v
