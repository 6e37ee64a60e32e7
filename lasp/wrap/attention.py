"""Softmax attention of Hugging Face models, through the registry that they all call."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from lasp.functional import softmax_attention
from lasp.parallel.group import SequenceGroup

NAME = "lasp"  # transformers reads "flash", "sdpa" and "flex" inside a name as more than a name
WIRING = "_lasp_wiring"
# Keywords that models hand through and that change nothing of the attention itself.
_HARMLESS = {
    "position_ids", "position_embeddings", "use_cache", "num_items_in_batch", "shift_labels",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
}  # fmt: skip


class Wiring:
    """What a parallelised module knows; a deep copy of the module shares the process group, which cannot be copied."""

    def __init__(self, group: SequenceGroup | None, method: str, before: str) -> None:
        self.group, self.method, self.before = group, method, before

    def __deepcopy__(self, memo: dict[int, Any]) -> Wiring:
        return Wiring(self.group, self.method, self.before)


class MaskDescriptor(NamedTuple):
    """What a mask says, in place of the mask: window in tokens, and which local keys [B, T] may be seen."""

    window: int | None
    key_mask: Tensor | None


def describe_mask(*, attention_mask: Tensor | None = None, local_size: int | None = None, **_: Any) -> MaskDescriptor:
    return MaskDescriptor(local_size, attention_mask)


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
    **others: Any,
) -> tuple[Tensor, None]:
    """query [B, H, T, D], key and value [B, Hk, T, D] of this rank's tokens; returns [B, T, H, D]."""
    wiring: Wiring | None = getattr(module, WIRING, None)
    unknown = sorted(name for name, x in others.items() if x is not None and name not in _HARMLESS)
    if wiring is None or unknown or dropout or not isinstance(attention_mask, MaskDescriptor):
        raise ValueError(
            f"{type(module).__name__}: lasp attention needs a parallelised module (is: {wiring is not None}), "
            f"dropout 0 (is {dropout}), a 2-D attention_mask or none ({type(attention_mask).__name__}) "
            f"and no other keywords {unknown}"
        )
    if sliding_window not in (None, attention_mask.window):
        raise ValueError(f"sliding_window={sliding_window}, but the mask has a window of {attention_mask.window}")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    output = softmax_attention(
        q, k, v, scale=scaling, window=attention_mask.window, softcap=softcap, sinks=s_aux,
        key_mask=attention_mask.key_mask, cu_seqlens=cu_seqlens, group=wiring.group, method=wiring.method,
    )  # fmt: skip
    return output, None
