"""What a parallelised module knows: its group, how its layers exchange, and which forward of its model it is in."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.methods import Method
from lasp.parallel.scan import Scan
from lasp.wrap.family import Family

WIRING = "_lasp_wiring"
OUTSIDE = (
    "a layer of a parallelised model that must know the batch was called outside of the model's forward, by itself or "
    "by a checkpoint of activations that lasp does not know: use model.gradient_checkpointing_enable()"
)
# Keywords that models hand through and that change nothing of what a layer computes.
_HARMLESS = {
    "position_ids", "position_embeddings", "use_cache", "num_items_in_batch", "shift_labels", "labels",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep",
}  # fmt: skip


class Forward:
    """One forward of a model: its layers find it, and again where a checkpoint repeats them in backward.

    cut: of the batch; sequences: how many it has. has_loss: whether the model came to our loss.
    """

    def __init__(self, cut: Cut, sequences: int) -> None:
        self.cut, self.sequences = cut, sequences
        self.has_loss = False


class Wiring:
    """Shared by all modules of one model; a deep copy of the model shares the process group, which cannot be copied.

    before: the attention implementation to restore, None where nothing was switched. family: the record of a foreign
    model's, None for a model of ours. Nothing of a batch is kept here:
    `running` is what this thread is in the middle of.
    """

    def __init__(
        self,
        group: SequenceGroup | None,
        method: Method,
        scan: str | Scan,
        before: str | None,
        model: nn.Module | None = None,
        family: Family | None = None,
    ) -> None:
        self.group, self.method, self.scan, self.before, self.family = group, method, scan, before, family
        self._model = None if model is None else weakref.ref(model)
        self._thread = threading.local()

    def __deepcopy__(self, memo: dict[int, Any]) -> Wiring:
        whole = memo.get(id(self.model))
        copied = Wiring(self.group, self.method, self.scan, self.before, whole, self.family)
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a parallelised model cannot be saved as an object: save model.state_dict(), or the whole model after "
            "lasp.unparallelize(model)"
        )

    @property
    def model(self) -> nn.Module | None:
        """The whole model that was wired; None where only a part of it is left, or was copied."""
        return None if self._model is None else self._model()

    @property
    def running(self) -> Forward | None:
        """The forward under way, in this thread."""
        found: Forward | None = getattr(self._thread, "forward", None)
        return found

    @contextmanager
    def within(self, forward: Forward) -> Iterator[None]:
        """Around what belongs to a forward."""
        before, self._thread.forward = self.running, forward
        try:
            yield
        finally:
            self._thread.forward = before


class LayerCall(NamedTuple):
    """One call of a module: what every function of `lasp` wants to know about the sequence."""

    wiring: Wiring
    cut: Cut | None
    cu_seqlens: Tensor | None

    @classmethod
    def of(cls, module: nn.Module, cu_seqlens: Tensor | None, tokens: int | None = None) -> LayerCall:
        """tokens: how many the module is given of every sequence, where that is known.

        A module that is called by itself, outside of its model's forward, is a direct call over the group. Raises
        ValueError where the model has put tokens of its own before or behind those of a rank.
        """
        wiring: Wiring = getattr(module, WIRING)
        if wiring.running is None and torch._C._current_graph_task_id() != -1:
            raise ValueError(OUTSIDE)  # repeated within a backward pass: of which batch?
        if wiring.running is None:
            return cls(wiring, None, cu_seqlens)
        cut = wiring.running.cut
        if tokens not in (None, cut.tokens):
            raise ValueError(
                f"{type(module).__name__} is given {tokens} tokens of this rank's {cut.tokens}: tokens put in or "
                "taken out within the model are those of each rank"
            )
        return cls(wiring, cut, None)

    @property
    def packed(self) -> bool:
        """Whether the sequence has documents."""
        return self.cu_seqlens is not None if self.cut is None else self.cut.packed

    @property
    def known_cut(self) -> Cut:
        """For what a group alone cannot tell. Raises ValueError for a module that is called by itself."""
        if self.cut is None:
            raise ValueError(OUTSIDE)
        return self.cut

    @property
    def ranks(self) -> dict[str, Any]:
        """Keywords of `lasp.shard` and `lasp.unshard`."""
        return {"group": self.wiring.group} if self.cut is None else {"cut": self.cut}

    @property
    def sequence(self) -> dict[str, Any]:
        """Keywords of `lasp.causal_conv1d`."""
        return self.ranks if self.cu_seqlens is None else self.ranks | {"cu_seqlens": self.cu_seqlens}

    @property
    def recurrence(self) -> dict[str, Any]:
        """Keywords of `lasp.linear_attention` and `lasp.delta_rule`."""
        return self.sequence | {"scan": self.wiring.scan}


def check_keywords(where: str, keywords: dict[str, Any]) -> None:
    """Raises ValueError for keywords that say something and are not understood."""
    unknown = sorted(name for name, x in keywords.items() if x is not None and x is not False and name not in _HARMLESS)
    if unknown:
        raise ValueError(f"{where}: lasp does not know what to do with {', '.join(unknown)}")
