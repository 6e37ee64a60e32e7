"""Hedgehog: linear attention with a learned spiky feature map."""

from typing import Any

from torch import Tensor

from lasp.layers import features
from lasp.layers.recurrent import RecurrentMixer


class Hedgehog(RecurrentMixer):
    """Softmax features of Wx and -Wx, W learned per head, divided by q·Σk (arXiv 2402.04347)."""

    output_norm = False
    normalise = True
    scale = 1.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.q_features = features.Hedgehog(self.num_heads, self.head_dim)
        self.k_features = features.Hedgehog(self.num_kv_heads, self.head_dim)

    def features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_features(q), self.k_features(k), v
