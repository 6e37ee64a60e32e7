"""ReBased: linear attention with a learned quadratic kernel."""

from typing import Any

from torch import Tensor

from lasp.layers.features import LearnedQuadratic
from lasp.layers.recurrent import RecurrentMixer


class Rebased(RecurrentMixer):
    """Features `(γ·norm(x) + β)²`, γ and β learned for queries and for keys, divided by q·Σk (arXiv 2402.10644)."""

    output_norm = False
    normalise = True
    scale = 1.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        eps = kwargs.get("norm_eps", 1e-5)
        self.q_features = LearnedQuadratic(self.head_dim, eps)
        self.k_features = LearnedQuadratic(self.head_dim, eps)

    def features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_features(q), self.k_features(k), v
