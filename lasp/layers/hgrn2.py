"""HGRN2, a gated linear recurrence with an outer-product state."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.layers.context import Context
from lasp.layers.recurrent import RecurrentMixer


class Hgrn2(RecurrentMixer):
    """The key is what the gate forgets: `S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T`, `f = b + (1 - b)·sigmoid(x W)`.

    The lower bound b rises from layer to layer, b = l / L in layer l = 0..L-1, so that upper layers remember longer
    (HGRN2, arXiv 2404.07904, section 3; its bounds are learned, these are fixed).
    """

    causal_only = True
    scale = 1.0

    def features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.silu(q), k, v

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        bound = self.layer_idx / self.num_layers
        logits = k.to(torch.promote_types(k.dtype, torch.float32))
        # Both from the logits: 1 - f would lose a small key, and log f a small gate.
        key = (1 - bound) * torch.sigmoid(-logits)
        log_decay = F.logsigmoid(logits) + math.log1p(-bound)
        if bound:
            log_decay = torch.logaddexp(log_decay, log_decay.new_tensor(math.log(bound)))
        return self.recur(q, key.to(k.dtype), v, log_decay.clamp(max=0), context)
