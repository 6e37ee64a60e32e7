"""LightNet: a running softmax over time in every channel of the keys."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.functional import logcumsumexp
from lasp.layers.context import Context
from lasp.layers.recurrent import RecurrentMixer
from lasp.layers.state import ScaledMemory


class LightNet(RecurrentMixer):
    """`S_t = sum_{s <= t} exp(k_s) v_s^T / sum_{s <= t} exp(k_s)` in every channel; SiLU on queries, a swish gate.

    With `z = logcumsumexp(k)` that is linear attention with keys `exp(k_t - z_t)` and decays `exp(z_{t-1} - z_t)`: two
    exchanges, a row for z and a state (additive decay of LightNet, arXiv 2405.21022). The first token of a text has
    nothing to fade.
    """

    causal_only = True
    gate = "silu"
    scale = 1.0

    def features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.silu(q), k, v

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, ScaledMemory | None]:
        state = context.state
        if state is not None and not isinstance(state, ScaledMemory):
            raise ValueError(f"LightNet continues from a ScaledMemory, got {type(state).__name__}")
        logits = k.to(torch.promote_types(k.dtype, torch.float32))
        mask = context.attention_mask
        found = logcumsumexp(
            logits if mask is None else logits.masked_fill(~mask[..., None, None], -torch.inf),
            exclusive=True,
            initial_state=None if state is None else state.log_scale,
            output_final_state=context.output_final_state,
            scan=self.scan,
            **context.sequence,
        )
        before, log_sum = found if isinstance(found, tuple) else (found, None)
        # exp(k - z) and z_{t-1} - z, both from z_{t-1}: the difference of two z loses small keys and small decays.
        lead = logits - before
        log_decay = F.logsigmoid(-lead).masked_fill(before.isneginf(), 0)
        o, memory = self.recur(
            q,
            torch.sigmoid(lead).to(k.dtype),
            v,
            log_decay,
            replace(context, state=None if state is None else state.memory),
        )
        return o, None if memory is None or log_sum is None else ScaledMemory(memory, log_sum)
