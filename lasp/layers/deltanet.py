"""DeltaNet: a memory that erases what a key held before it writes there."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.functional import delta_rule
from lasp.layers.context import Context
from lasp.layers.recurrent import RecurrentMixer


class DeltaNet(RecurrentMixer):
    """`S_t = (I - β_t k_t k_t^T) S_{t-1} + β_t k_t v_t^T`, with k and q of length 1 and β_t in (0, 1) per head.

    A short convolution with SiLU goes ahead (arXiv 2406.06484, section 3.3).

    Args:
        allow_neg_eigval: β_t in (0, 2): a token may turn what its key held around, which lets states count
            (arXiv 2411.12537).
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: what `Mixer` raises; in `forward` also an attention_mask beside cu_seqlens or other ranks.
    """

    causal_only = True
    conv_size = 4

    def __init__(self, *args: Any, allow_neg_eigval: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.most = 2.0 if allow_neg_eigval else 1.0
        self.beta_proj = nn.Linear(self.q_proj.in_features, self.num_kv_heads, bias=False)

    def features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return unit_length(q), unit_length(k), v

    def beta(self, x: Tensor) -> Tensor:
        """How much of what its key holds a token erases, [B, T, H_kv], at least fp32."""
        return self.most * torch.sigmoid(self.beta_proj(x).to(torch.promote_types(x.dtype, torch.float32)))

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        return self.recur(q, k, v, self.log_decay(x), context, delta_rule, beta=self.beta(x))


def unit_length(x: Tensor) -> Tensor:
    """x divided by its length over the last dim, computed in at least fp32."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-6).to(x.dtype)
