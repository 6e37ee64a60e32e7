"""Softmax attention, the N of a hybrid's pattern."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.functional import softmax_attention
from lasp.layers.context import Context
from lasp.layers.mixer import Mixer
from lasp.layers.rotary import Rotary
from lasp.layers.state import KeyValues
from lasp.parallel.methods import Method


class SoftmaxAttention(Mixer):
    """Softmax attention with rotary positions, as in Llama: no output norm, no gate.

    Its state is the keys and values of the tokens so far, of one text on one device; with a window only of those that
    a later token can still see.

    Args:
        window: tokens a token sees, itself and padding included; causal only. None: all before it.
        rope_theta: base of the rotary positions; Llama 3's by default.
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: a window below 1 or without causal; and what `Mixer` and `Rotary` raise. In `forward` also a state,
            given or asked for, together with causal=False, cu_seqlens or other ranks.
    """

    output_norm = False
    method: Method = "auto"  # how ranks share keys and values, as in `softmax_attention`

    def __init__(self, *args: Any, window: int | None = None, rope_theta: float = 500_000.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if window is not None and (window < 1 or not self.causal):
            raise ValueError(f"window must be at least 1 and needs causal=True, got {window} and causal={self.causal}")
        self.window = window
        self.rotary = Rotary(self.head_dim, rope_theta)

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, KeyValues | None]:
        known = self._known(k, v, context)
        if known is not None and context.state is not None:
            o = attend_to_known(q, known, self.window)
        else:
            o = softmax_attention(
                q,
                k,
                v,
                causal=self.causal,
                window=self.window,
                key_mask=context.attention_mask,
                method=self.method,
                **context.sequence,
            )
        if known is None or not context.output_final_state:
            return o, None
        return o, known if self.window is None else known.last(self.window - 1)

    def _known(self, k: Tensor, v: Tensor, context: Context) -> KeyValues | None:
        """Keys and values from the first token on; None where no state is given or asked for."""
        if context.state is None and not context.output_final_state:
            return None
        if not self.causal or context.packed or context.ranks > 1:
            raise ValueError(
                "softmax attention keeps a state only of what came before, in one text on one device; got"
                f" causal={self.causal}, packed={context.packed}, ranks={context.ranks}"
            )
        mask = context.attention_mask
        new = KeyValues(k, v, k.new_ones(k.shape[:2], dtype=torch.bool) if mask is None else mask)
        if context.state is None:
            return new
        if not isinstance(context.state, KeyValues):
            raise ValueError(f"SoftmaxAttention continues from KeyValues, got {type(context.state).__name__}")
        return context.state.followed_by(new)


def attend_to_known(q: Tensor, known: KeyValues, window: int | None) -> Tensor:
    """Causal attention of the last T of N known tokens, q [B, T, H, D] and output [B, T, H, D]."""
    tokens = torch.arange(known.k.shape[1], device=q.device)
    distance = tokens[known.k.shape[1] - q.shape[1] :, None] - tokens
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    # Padding sees itself, so that no query is left without a key: PyTorch's kernels disagree on what it would get.
    mask = seen & (known.shown[:, None] | (distance == 0))
    q, k, v = (x.transpose(1, 2) for x in (q, known.k, known.v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2)
