"""mLSTM, the matrix memory of xLSTM with exponential gates."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.functional import running_maximum
from lasp.layers.context import Context
from lasp.layers.recurrent import RecurrentMixer
from lasp.layers.state import ScaledMemory


class MLstm(RecurrentMixer):
    """`C_t = f_t C_{t-1} + i_t k_t v_t^T`, n_t likewise of k_t, `h_t = C_t^T q_t / max(|n_t^T q_t|, 1)`, per head.

    i = exp(..), f = sigmoid(..); a sigmoid output gate behind the output norm. The memory is kept divided by exp(m_t),
    with `m_t = max(m_{t-1} + log f_t, log i_t)`, so that no exponential is above 1: two exchanges, two numbers per head
    for m and a state (xLSTM, arXiv 2405.04517, equations 19 to 27).

    Args:
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: what `Mixer` raises.
    """

    causal_only = True
    gate = "sigmoid"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hidden = self.q_proj.in_features
        self.input_proj = nn.Linear(hidden, self.num_kv_heads, bias=False)
        self.forget_proj = nn.Linear(hidden, self.num_kv_heads, bias=False)
        self.input_bias = nn.Parameter(torch.zeros(self.num_kv_heads))
        self.forget_bias = nn.Parameter(torch.linspace(3, 6, self.num_kv_heads))

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, ScaledMemory | None]:
        state = context.state
        if state is not None and not isinstance(state, ScaledMemory):
            raise ValueError(f"MLstm continues from a ScaledMemory, got {type(state).__name__}")
        enters = self.input_proj(x).double() + self.input_bias.double()
        forgets = F.logsigmoid(self.forget_proj(x).double() + self.forget_bias.double())
        if context.attention_mask is not None:
            padding = ~context.attention_mask.unsqueeze(-1)
            enters, forgets = enters.masked_fill(padding, -torch.inf), forgets.masked_fill(padding, 0)
        before, highest, last = running_maximum(
            enters.detach(),
            forgets.detach(),
            initial_state=None if state is None else state.log_scale,
            output_final_state=context.output_final_state,
            scan=self.scan,
            **context.sequence,
        )
        dtype = torch.promote_types(x.dtype, torch.float32)
        # What is divided out again has no gradient; a difference that rounding made positive still has the gate's.
        kept = (forgets.detach() + before - highest).masked_fill(before.isneginf(), 0).clamp(max=0)
        log_decay = (kept + (forgets - forgets.detach())).to(dtype)
        weight = (enters - highest.masked_fill(highest.isneginf(), 0)).exp().to(dtype)
        written = (F.pad(v, (0, 1), value=1.0) * weight.unsqueeze(-1)).to(v.dtype)
        o, memory = self.recur(
            q, k, written, log_decay, replace(context, state=None if state is None else state.memory)
        )
        least = (-highest).exp().to(dtype).repeat_interleave(self.num_heads // self.num_kv_heads, 2)
        h = o[..., :-1] / torch.maximum(o[..., -1:].to(dtype).abs(), least.unsqueeze(-1))
        return h.to(v.dtype), None if memory is None or last is None else ScaledMemory(memory, last)
