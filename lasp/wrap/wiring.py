"""What a parallelised module knows: its group, how its layers exchange, and the batch that its model is called with."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn

from lasp.parallel.call import together
from lasp.parallel.group import SequenceGroup
from lasp.parallel.layout import pieces_of
from lasp.parallel.softmax import Method

WIRING = "_lasp_wiring"
MOST_DRAWN = 2**16  # seeds of dropout that wait for their backward: hundreds of calls of a model
# Keywords that models hand through and that change nothing of what a layer computes.
_HARMLESS = {
    "position_ids", "position_embeddings", "use_cache", "num_items_in_batch", "shift_labels", "labels",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep",
}  # fmt: skip


class Batch(NamedTuple):
    """How the sequences of one call of a model lie on the ranks.

    sequences: how many; lengths: every rank's number of tokens; parts: where this rank's lie in the whole sequence;
    packed: whether it has documents.
    """

    sequences: int
    lengths: tuple[int, ...]
    parts: tuple[tuple[int, int], ...]
    packed: bool

    @property
    def tokens(self) -> int:
        return sum(stop - start for start, stop in self.parts)


class Wiring:
    """Shared by all modules of one model; a deep copy of the model shares the process group, which cannot be copied.

    before: the attention implementation to restore, None where nothing was switched. batch:
    what the model was last called with. positions [T]: of this rank's tokens, in their documents. inside: whether its
    forward is under way; a layer also runs outside of it, where activation checkpointing repeats it, maybe of an
    earlier batch. has_loss: whether this call came to our loss.
    """

    def __init__(
        self, group: SequenceGroup | None, method: Method, scan: str, before: str | None, model: nn.Module | None = None
    ) -> None:
        self.group, self.method, self.scan, self.before = group, method, scan, before
        self._model = None if model is None else weakref.ref(model)
        self.batch: Batch | None = None
        self.positions: Tensor | None = None
        self._drawn: dict[int, Batch] = {}
        self.inside = self.has_loss = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Wiring:
        model = None if self._model is None else self._model()
        return Wiring(self.group, self.method, self.scan, self.before, memo.get(id(model), model))

    @property
    def model(self) -> nn.Module:
        """The whole model, of which the caller holds a part."""
        model = None if self._model is None else self._model()
        assert model is not None, "the model of its own layers"
        return model

    @property
    def running(self) -> Batch | None:
        """The batch of the call under way."""
        return self.batch if self.inside else None

    def batch_of(self, seed: int) -> Batch | None:
        """The batch of the call that drew a seed, also where activation checkpointing draws it again in backward."""
        if self.running is not None:
            self._drawn[seed] = self.running
            if len(self._drawn) > MOST_DRAWN:
                del self._drawn[next(iter(self._drawn))]
        return self._drawn.get(seed)


def parts_of(lengths: tuple[int, ...], group: SequenceGroup | None) -> tuple[tuple[int, int], ...]:
    """Where this rank's tokens lie in a sequence of which the ranks hold `lengths`."""
    rank, layout = (0, "contiguous") if group is None else (group.rank, group.layout)
    return tuple((p.start, p.stop) for p in pieces_of(lengths, layout) if p.rank == rank)


class LayerCall(NamedTuple):
    """One call of a module: what every function of `lasp` wants to know about the sequence."""

    wiring: Wiring
    cu_seqlens: Tensor | None

    @classmethod
    def of(cls, module: nn.Module, cu_seqlens: Tensor | None, tokens: int | None = None) -> LayerCall:
        """tokens: how many the module is given of every sequence, where that is known.

        Raises ValueError on every rank where the model does not hand the documents on, for they would leak into one
        another, and where it has put tokens of its own before or behind those of a rank.
        """
        wiring: Wiring = getattr(module, WIRING)
        batch = wiring.running
        if batch is not None and batch.packed and cu_seqlens is None:
            refuse(wiring.group, f"packed documents: the model does not hand cu_seqlens on to {type(module).__name__}")
        if batch is not None and tokens not in (None, batch.tokens):
            refuse(
                wiring.group,
                f"{type(module).__name__} is given {tokens} tokens of this rank's {batch.tokens}: tokens put in or "
                "taken out within the model are those of each rank",
            )
        return cls(wiring, cu_seqlens)

    @property
    def sequence(self) -> dict[str, Any]:
        """Keywords of `lasp.causal_conv1d`."""
        return {"cu_seqlens": self.cu_seqlens, "group": self.wiring.group}

    @property
    def recurrence(self) -> dict[str, Any]:
        """Keywords of `lasp.linear_attention` and `lasp.delta_rule`."""
        return self.sequence | {"scan": self.wiring.scan}


def refuse(group: SequenceGroup | None, message: str) -> NoReturn:
    """Raise ValueError, and on a rank that waits for this one at its next exchange as well."""

    def fail() -> NoReturn:
        raise ValueError(message)

    together(group, "a layer of the model", fail)
    raise AssertionError("it raises")


def check_keywords(where: str, keywords: dict[str, Any]) -> None:
    """Raises ValueError for keywords that say something and are not understood."""
    unknown = sorted(name for name, x in keywords.items() if x is not None and x is not False and name not in _HARMLESS)
    if unknown:
        raise ValueError(f"{where}: lasp does not know what to do with {', '.join(unknown)}")
