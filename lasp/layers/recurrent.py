"""The part every linear mixer shares: a recurrence on a memory of fixed size."""

import torch
from torch import Tensor

from lasp.functional import linear_attention
from lasp.layers.mixer import Context, Mixer


class RecurrentMixer(Mixer):
    """Base of the token mixers with a state `S_t = a_t S_{t-1} + k_t v_t^T`; by itself: no features, no decay, no gate.

    The norm stands where older linear attention divides by q·Σk: it bounds the output for signed features too, where
    that denominator can cross zero (TransNormerLLM, arXiv 2307.14995).

    The state is [B or N, H_kv, D, D] in fp32 (fp64 for fp64 inputs), for N packed documents.
    """

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Logarithm of the decay, <= 0 and at least fp32: None | [H_kv] | [B, T, H_kv] | [B, T, H_kv, D]."""
        return None

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        if context.state is not None and not isinstance(context.state, Tensor):
            raise ValueError(f"{type(self).__name__} continues from a state tensor, got {type(context.state).__name__}")
        log_decay = self.log_decay(x)
        if context.attention_mask is not None:
            k, log_decay = skip_padding(k, log_decay, context.attention_mask)
        result = linear_attention(
            q,
            k,
            v,
            log_decay,
            initial_state=context.state,
            output_final_state=context.output_final_state,
            cu_seqlens=context.cu_seqlens,
            causal=self.causal,
            group=context.group,
        )
        return result if isinstance(result, tuple) else (result, None)


def skip_padding(k: Tensor, log_decay: Tensor | None, attention_mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Keys and decays with which a token of `attention_mask` False (padding) maps every state to itself.

    It adds no key, and a decay that would fade the state while padding passes becomes 1. A decay per head therefore
    becomes one per token.

    Args:
        k: [B, T, H, D].
        log_decay: None | [H] | [B, T, H] | [B, T, H, D].
        attention_mask: [B, T] bool.
    """
    mask = attention_mask[..., None]
    k = k.masked_fill(~mask[..., None], 0)
    if log_decay is not None:
        log_decay = torch.where(mask if log_decay.ndim < 4 else mask[..., None], log_decay, 0)
    return k, log_decay
