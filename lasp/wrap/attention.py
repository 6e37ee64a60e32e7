"""Softmax attention of Hugging Face models, through the registry that they all call."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from lasp.functional import softmax_attention
from lasp.parallel.untraced import outside
from lasp.wrap.wiring import WIRING, LayerCall, check_keywords

NAME = "lasp"  # transformers reads "flash", "sdpa" and "flex" inside a name as more than a name


class MaskDescriptor(NamedTuple):
    """What a mask says, in place of the mask: window in tokens, and which local keys [B, T] may be seen."""

    window: int | None
    key_mask: Tensor | None


def describe_mask(*, attention_mask: Tensor | None = None, local_size: int | None = None, **_: Any) -> MaskDescriptor:
    return MaskDescriptor(local_size, attention_mask)


@outside
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskDescriptor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [B, H, T, D], key and value [B, Hk, T, D] of this rank's tokens; returns [B, T, H, D]."""
    where = type(module).__name__
    if not hasattr(module, WIRING):
        raise ValueError(f"{where} was not there when lasp.parallelize wired the model")
    check_keywords(where, others)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if dropout or not causal or not isinstance(attention_mask, MaskDescriptor):
        raise ValueError(
            f"{where}: lasp attention needs a 2-D attention_mask or none (is {type(attention_mask).__name__}), "
            f"dropout 0 (is {dropout}) and causal attention (is {causal})"
        )
    if sliding_window not in (None, attention_mask.window):
        raise ValueError(f"{where}: sliding_window={sliding_window}, but its mask has {attention_mask.window}")
    call = LayerCall.of(module, cu_seqlens, query.shape[2])
    # Autocast leaves rotated queries and keys in fp32, and values in its own dtype.
    q, k, v = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
    output = softmax_attention(
        q, k, v, scale=scaling, window=attention_mask.window, softcap=softcap, sinks=s_aux,
        key_mask=attention_mask.key_mask, method=call.wiring.method, **call.sequence,
    )  # fmt: skip
    return output, None
