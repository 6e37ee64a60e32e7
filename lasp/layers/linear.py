"""Basic linear attention."""

from typing import Any

import torch
from torch import Tensor

from lasp.layers.mixer import Mixer


class LinearAttention(Mixer):
    """Linear attention with the feature map elu + 1 on queries and keys, and no decay.

    "Transformers are RNNs" (arXiv 2006.16236, equation 7), with the output norm in the place of the denominator.

    Args:
        causal: False lets every token see the whole sequence, as in an encoder.
        *args, **kwargs: as for `Mixer`.
    """

    def __init__(self, *args: Any, causal: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.causal = causal

    def features(self, q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return elu_plus_one(q), elu_plus_one(k), v


def elu_plus_one(x: Tensor) -> Tensor:
    """x + 1 above zero, exp(x) below: elu(x) + 1 without rounding small values of exp(x) against the 1."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
