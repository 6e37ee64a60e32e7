"""DeltaProduct: several delta-rule steps to a token."""

from typing import Any

from torch import Tensor, nn

from lasp.functional import delta_product
from lasp.layers.context import Context
from lasp.layers.gated_deltanet import GatedDeltaNet


class DeltaProduct(GatedDeltaNet):
    """Gated DeltaNet whose tokens erase and write `num_householder` times, each time with a key and value of their own.

    A token's map of the state is a product of that many Householder matrices, which with β in (0, 2) can be any
    rotation of as many dims: what states need to follow permutations (arXiv 2502.10297).

    Args:
        num_householder: steps to a token.
        allow_neg_eigval: β in (0, 2), as in the paper.
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: fewer than one step, and what `DeltaNet` raises.
    """

    def __init__(self, *args: Any, num_householder: int = 2, allow_neg_eigval: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, allow_neg_eigval=allow_neg_eigval, **kwargs)
        if num_householder < 1:
            raise ValueError(f"num_householder must be at least 1, got {num_householder}")
        self.num_householder = num_householder
        hidden, width = self.q_proj.in_features, num_householder * self.num_kv_heads
        self.k_proj = nn.Linear(hidden, width * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, width * self.head_dim, bias=False)
        self.beta_proj = nn.Linear(hidden, width, bias=False)
        self.short_conv = self._new_conv()

    def split(self, *projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = projected
        return self._heads(q), self._steps(self._heads(k)), self._steps(self._heads(v))

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        return self.recur(q, k, v, self.log_decay(x), context, delta_product, beta=self._steps(self.beta(x)))

    def _steps(self, x: Tensor) -> Tensor:
        """[B, T, n·H, ...] as [B, T, n, H, ...]."""
        return x.unflatten(2, (self.num_householder, -1))
