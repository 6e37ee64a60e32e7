"""MiniMax-01 (arXiv:2501.08313): lightning attention, with a norm over all heads behind it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lasp.functional import linear_attention
from lasp.wrap.family import Family
from lasp.wrap.wiring import LayerCall, check_keywords


def lightning(
    call: LayerCall,
    module: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """MiniMax-01's `forward` (arXiv:2501.08313): a decay per head, and a norm over all heads behind it."""
    check_keywords(type(module).__name__, others)
    qkv = module.act_fn(module.qkv_proj(hidden_states))
    if attention_mask is not None:
        qkv = (qkv * attention_mask.unsqueeze(-1)).to(qkv.dtype)
    q, k, v = qkv.unflatten(2, (module.num_attention_heads, 3, module.head_dim)).unbind(3)
    output = linear_attention(q, k, v, -module.slope_rate.flatten(), scale=1.0, **call.recurrence)
    return module.out_proj(module.output_gate(hidden_states).sigmoid() * module.norm(output.flatten(2))), None


FAMILIES = (Family("minimax", methods={"MiniMaxLightningAttention": {"forward": lightning}}),)
