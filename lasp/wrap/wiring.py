"""What a parallelised module knows: its group, and how its layers exchange."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from lasp.parallel.group import SequenceGroup
from lasp.parallel.softmax import Method

WIRING = "_lasp_wiring"
# Keywords that models hand through and that change nothing of what a layer computes.
_HARMLESS = {
    "position_ids", "position_embeddings", "use_cache", "num_items_in_batch", "shift_labels", "labels",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep",
}  # fmt: skip


class Wiring:
    """Shared by all modules of one model; a deep copy of the model shares the process group, which cannot be copied.

    before: the attention implementation to restore. Of the batch that the model was last called with: whether it has
    documents, its number of tokens over all ranks, and the positions of this rank's tokens [T].
    """

    def __init__(self, group: SequenceGroup | None, method: Method, scan: str, before: str) -> None:
        self.group, self.method, self.scan, self.before = group, method, scan, before
        self.packed, self.length = False, 0
        self.positions: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Wiring:
        return Wiring(self.group, self.method, self.scan, self.before)


class LayerCall(NamedTuple):
    """One call of a module: what every function of `lasp` wants to know about the sequence."""

    wiring: Wiring
    cu_seqlens: Tensor | None

    @classmethod
    def of(cls, module: nn.Module, cu_seqlens: Tensor | None) -> LayerCall:
        """Raises ValueError where the model does not hand the documents on: they would leak into one another."""
        wiring: Wiring = getattr(module, WIRING)
        if wiring.packed and cu_seqlens is None:
            raise ValueError(f"packed documents: the model does not hand cu_seqlens on to {type(module).__name__}")
        return cls(wiring, cu_seqlens)

    @property
    def sequence(self) -> dict[str, Any]:
        """Keywords of `lasp.causal_conv1d`."""
        return {"cu_seqlens": self.cu_seqlens, "group": self.wiring.group}

    @property
    def recurrence(self) -> dict[str, Any]:
        """Keywords of `lasp.linear_attention` and `lasp.delta_rule`."""
        return self.sequence | {"scan": self.wiring.scan}


def check_keywords(where: str, keywords: dict[str, Any]) -> None:
    """Raises ValueError for keywords that say something and are not understood."""
    unknown = sorted(name for name, x in keywords.items() if x is not None and x is not False and name not in _HARMLESS)
    if unknown:
        raise ValueError(f"{where}: lasp does not know what to do with {', '.join(unknown)}")
