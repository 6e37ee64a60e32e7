"""HGRN2, a gated linear recurrence with an outer-product state."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.layers.context import Context
from lasp.layers.recurrent import RecurrentMixer


class Hgrn2(RecurrentMixer):
    """The key is what the gate forgets: `S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T`, `f = b + (1 - b)·sigmoid(x W)`.

    The lower bound b rises from layer to layer, so that upper layers remember longer (HGRN2, arXiv 2404.07904, section
    3): by itself b = l / L in layer l = 0..L-1.

    Args:
        learned_bounds: b is learned per channel, as in the paper. It depends on all layers of a model, which has the
            parameter (`rising_bounds`) and tells each of them its bound.
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: what `Mixer` raises; in `forward` also a learned bound that is not told.
    """

    causal_only = True
    scale = 1.0

    def __init__(self, *args: Any, learned_bounds: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.learned_bounds = learned_bounds

    def features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.silu(q), k, v

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        logits = k.to(torch.promote_types(k.dtype, torch.float32))
        bound = self._bound(context, logits)
        # Both from the logits: 1 - f would lose a small key, and log f a small gate.
        key = (1 - bound) * torch.sigmoid(-logits)
        log_decay = F.logsigmoid(logits) + torch.log1p(-bound)
        lowest = bound.clamp(min=torch.finfo(bound.dtype).tiny).log()  # of the first layer, whose bound is 0, too
        return self.recur(q, key.to(k.dtype), v, torch.logaddexp(log_decay, lowest).clamp(max=0), context)

    def _bound(self, context: Context, logits: Tensor) -> Tensor:
        """[] or [H_kv, D]."""
        if not self.learned_bounds:
            return logits.new_tensor(self.layer_idx / self.num_layers)
        if context.lower_bound is None:
            raise ValueError("the learned bounds of Hgrn2 are a parameter of its model: give forward its lower_bound")
        return self._heads(context.lower_bound.to(logits.dtype))


def rising_bounds(logits: Tensor) -> Tensor:
    """Lower bounds [L, width] of L layers: sums of a softmax over the layers, without the first one's share, so that
    they rise from 0 and stay below 1 (HGRN, arXiv 2311.04823, section 3.2)."""
    shares = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(0)
    return F.pad(shares[1:].cumsum(0), (0, 0, 1, 0))
