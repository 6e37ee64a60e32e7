"""Lightning attention, the mixer of TransNormerLLM and MiniMax-01."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.layers.recurrent import RecurrentMixer


class Lightning(RecurrentMixer):
    """SiLU on queries, keys and values, one fixed decay per head, and a sigmoid output gate.

    Head h = 1..H of layer l = 0..L-1 forgets with `log λ = -s_h (1 - l/L)` per token: lower layers look near, upper
    layers far, and even the last one forgets. The decays are not learned (learning them was unstable: TransNormerLLM,
    arXiv 2307.14995). H counts the key/value heads.

    Args:
        slopes: "alibi" for `s_h = 2^(-8h/H)`, as in the released TransNormerLLM and MiniMax-01 (arXiv 2501.08313): at
            16 heads, layer 0 remembers 1 to 256 tokens. "linear" for `s_h = 8h/H`, as printed in the TransNormerLLM
            paper: at most 2 tokens there.
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: an unknown kind of slopes; and what `Mixer` raises.
    """

    causal_only = True
    gate = "sigmoid"

    def __init__(self, *args: Any, slopes: str = "alibi", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if slopes not in ("alibi", "linear"):
            raise ValueError(f"slopes must be 'alibi' or 'linear', got {slopes!r}")
        self.slopes = slopes

    def features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.silu(q), F.silu(k), F.silu(v)

    def log_decay(self, x: Tensor) -> Tensor:
        # Computed, not a buffer: `.to(bfloat16)` would round a buffer, and loading on the meta device would lose it.
        dtype = torch.promote_types(x.dtype, torch.float32)
        steps = torch.arange(1, self.num_kv_heads + 1, device=x.device, dtype=dtype) * (8 / self.num_kv_heads)
        slopes = torch.exp2(-steps) if self.slopes == "alibi" else steps
        return -slopes[self.own] * (1 - self.layer_idx / self.num_layers)
