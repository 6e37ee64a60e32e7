"""The part every linear mixer shares: a recurrence on a memory of fixed size."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.functional import linear_attention
from lasp.layers.context import Context
from lasp.layers.mixer import Mixer
from lasp.layers.state import State
from lasp.parallel.scan import ScanName


class RecurrentMixer(Mixer):
    """Base of the token mixers with a state `S_t = A_t S_{t-1} + k_t v_t^T`; by itself: no features, no decay, no gate.

    The norm stands where older linear attention divides by q·Σk: it bounds the output for signed features too, where
    that denominator can cross zero (TransNormerLLM, arXiv 2307.14995). Mixers whose features are positive may divide.

    The state is [B or N, H_kv, K, V] in fp32 (fp64 for fp64 inputs), for N packed documents.
    """

    scale: ClassVar[float | None] = None  # of the queries; None: one over the root of their dim
    scan: ScanName = "auto"  # how ranks share their states, as in `linear_attention`
    normalise: bool = False  # divide by q·Σk, which one more column of values sums up

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Logarithm of the decay, <= 0 and at least fp32: None | [H_kv] | [B, T, H_kv] | [B, T, H_kv, D]."""
        return None

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, State | None]:
        return self.recur(q, k, v, self.log_decay(x), context, causal=self.causal)

    def recur(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        context: Context,
        operation: Callable[..., Any] = linear_attention,
        **arguments: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run an operation of `lasp.functional`: its output [B, T, H, V], and the final state or None."""
        memory = self.memory_of(context)
        if context.attention_mask is not None:
            k, log_decay = skip_padding(k, log_decay, context.attention_mask)
        result = operation(
            q,
            k,
            F.pad(v, (0, 1), value=1.0) if self.normalise else v,
            log_decay=log_decay,
            scale=self.scale,
            initial_state=memory,
            output_final_state=context.output_final_state,
            scan=self.scan,
            **context.sequence,
            **arguments,
        )
        output, final = result if isinstance(result, tuple) else (result, None)
        if self.normalise:
            # Only now: what other ranks added is in both. A token that has seen nothing but padding stays 0.
            output, total = output[..., :-1], output[..., -1:]
            output = output / total.masked_fill(total == 0, 1)
        return output, final

    def memory_of(self, context: Context) -> Tensor | None:
        """The state to continue from. Raises ValueError for that of another kind of mixer."""
        if context.state is not None and not isinstance(context.state, Tensor):
            raise ValueError(f"{type(self).__name__} continues from a state tensor, got {type(context.state).__name__}")
        return context.state


def skip_padding(k: Tensor, log_decay: Tensor | None, attention_mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Keys and decays with which a token of `attention_mask` False (padding) maps every state to itself.

    It adds no key, and a decay that would fade the state while padding passes becomes 1. A decay per head therefore
    becomes one per token.

    Args:
        k: [B, T, H, D], or [B, T, n, H, D] for n steps to a token.
        log_decay: None | [H] | [B, T, H] | [B, T, H, D].
        attention_mask: [B, T] bool.
    """
    mask = attention_mask[..., None]
    k = k.masked_fill(~attention_mask.view(*attention_mask.shape, *(1,) * (k.ndim - 2)), 0)
    if log_decay is not None:
        log_decay = torch.where(mask if log_decay.ndim < 4 else mask[..., None], log_decay, 0)
    return k, log_decay
