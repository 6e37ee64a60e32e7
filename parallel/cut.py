"""Cut: how one batch lies on the ranks of a group. A frozen value, agreed once and passed down.

Every operation that is given a cut sends data and nothing else: what ranks must know of each other is in it, as
integers. What follows from it (plans, halos, rotations, positions) is computed when it is first asked for, and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from lasp.kernels.arguments import told
from lasp.kernels.documents import document_bounds
from lasp.kernels.values import check_values, may_look_at
from lasp.parallel.layout import Layout, Piece, Plan, even_pieces, make_plan, pieces_of

if TYPE_CHECKING:
    from lasp.parallel.group import SequenceGroup

T = TypeVar("T")


class Cut:
    """How the sequences of one batch lie on the ranks; made by `SequenceGroup.cut`, `lasp.shard_batch` and collators.

    group: the ranks, None for one device alone. lengths: every rank's number of tokens of each sequence. bounds: of
    packed documents in the whole sequence, as in cu_seqlens; None for one document. keys: of the batch, and ids: the
    least and the largest of its input_ids, where whoever made the cut has looked at them.

    Raises ValueError for lengths that are not one per rank or that the group's layout does not allow, and for bounds
    that do not end where the sequence does. Not a dataclass: torch rebuilds those that it finds among the arguments of
    a module (FSDP2, mixed precision of DDP), and what a copy has computed is lost.
    """

    group: SequenceGroup | None
    lengths: tuple[int, ...]
    bounds: tuple[int, ...] | None
    keys: frozenset[str] | None
    ids: tuple[int, int] | None
    _kept: dict[Hashable, Any]

    def __init__(
        self,
        group: SequenceGroup | None,
        lengths: tuple[int, ...],
        bounds: tuple[int, ...] | None = None,
        keys: frozenset[str] | None = None,
        ids: tuple[int, int] | None = None,
    ) -> None:
        ranks = 1 if group is None else group.size
        if not isinstance(lengths, tuple) or len(lengths) != ranks or any(length < 0 for length in lengths):
            raise ValueError(
                f"lengths must be a tuple of one number of tokens per rank, {ranks} of them, got {lengths}"
            )
        facts: dict[str, Any] = {
            "group": group,
            "lengths": lengths,
            "bounds": None if bounds is None else document_bounds(bounds, sum(lengths)),
            "keys": keys,
            "ids": ids,
            "_kept": {},
        }
        for name, fact in facts.items():
            object.__setattr__(self, name, fact)
        if ranks > 1 and self.total:
            pieces_of(lengths, self.layout)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a cut is never changed: {name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cut) and self._facts == other._facts

    def __hash__(self) -> int:
        return hash(self._facts)

    def __repr__(self) -> str:
        ranks = "one device" if self.group is None else f"rank {self.rank} of {self.size}, {self.layout}"
        return f"Cut({list(self.lengths)} on {ranks}, bounds={self.bounds})"

    @property
    def _facts(self) -> tuple[Any, ...]:
        return self.group, self.lengths, self.bounds, self.keys, self.ids

    def of_batch(self, keys: frozenset[str], ids: tuple[int, int] | None) -> Cut:
        """The same, of a batch that was looked at."""
        return Cut(self.group, self.lengths, self.bounds, keys, ids)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.lengths)

    @property
    def layout(self) -> Layout:
        return "contiguous" if self.group is None else self.group.layout

    @property
    def tokens(self) -> int:
        """This rank's number of them, of each sequence."""
        return self.lengths[self.rank]

    @property
    def total(self) -> int:
        """The whole sequence's number of tokens."""
        return sum(self.lengths)

    @property
    def packed(self) -> bool:
        """Whether the sequence has documents."""
        return self.bounds is not None

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Those of all ranks, by position."""
        return pieces_of(self.lengths, self.layout) if self.total else ()

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Where this rank's tokens lie in the whole sequence, in local order."""
        return self.keep("parts", lambda: tuple((p.start, p.stop) for p in self.pieces if p.rank == self.rank))

    def plan(self, steps: int = 1) -> Plan:
        """This rank's runs and all links, of a recurrence that takes `steps` steps per token."""
        return self.keep(("plan", steps), lambda: self._plan(steps))

    def _plan(self, steps: int) -> Plan:
        whole = make_plan(self.lengths, self.rank, self.layout, self.bounds)
        return whole if steps == 1 else whole.times(steps)

    def positions(self, device: torch.device | None = None) -> Tensor:
        """Of this rank's tokens, counted from 0 in their documents, [T]."""
        return self.keep(("positions", device), lambda: self._positions(device))

    @torch.inference_mode(False)  # kept for later calls, which may record gradients
    def _positions(self, device: torch.device | None) -> Tensor:
        bounds = (0, self.total) if self.bounds is None else self.bounds
        counts = torch.cat([torch.arange(stop - start, device="cpu") for start, stop in pairwise(bounds)])
        return torch.cat([counts[:0], *(counts[start:stop] for start, stop in self.parts)]).to(device)

    def cu_seqlens(self, device: torch.device | None = None) -> Tensor | None:
        """The bounds of documents as a tensor [documents + 1], int32."""
        return None if self.bounds is None else self.keep(("cu_seqlens", device), lambda: self._cu_seqlens(device))

    @torch.inference_mode(False)
    def _cu_seqlens(self, device: torch.device | None) -> Tensor:
        return torch.tensor(self.bounds, dtype=torch.int32, device="cpu").to(device)

    def check_documents(self, cu_seqlens: Tensor | Sequence[int]) -> None:
        """Raises ValueError for other bounds of documents than the cut's. An accelerator is not waited for."""
        own = self.cu_seqlens(cu_seqlens.device if isinstance(cu_seqlens, Tensor) else None)
        given = cu_seqlens if isinstance(cu_seqlens, Tensor) else torch.as_tensor(cu_seqlens)
        wrong = "cu_seqlens are others than those of the batch's cut"
        if own is None or given.shape != own.shape:
            raise ValueError(f"{wrong}: {list(given.shape)}, not {None if own is None else list(own.shape)}")
        if may_look_at(given):
            check_values(given == own, lambda: wrong)

    def check_mask(self, attention_mask: Tensor | None) -> None:
        """Raises ValueError for an attention_mask that whoever made the cut of a batch had not: ranks may differ."""
        if attention_mask is not None and self.keys is not None and "attention_mask" not in self.keys:
            raise ValueError("the attention_mask is not of the batch that was cut: give it to lasp.shard_batch")

    def to(self, *args: Any, **kwargs: Any) -> Cut:
        """Itself: a batch is often moved value by value, and a cut is nowhere."""
        return self

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once for each key."""
        if key not in self._kept:
            self._kept[key] = make()
        return cast(T, self._kept[key])

    def __copy__(self) -> Cut:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Cut:
        return self


def check_group(group: Any) -> None:
    """Raises ValueError for what is no SequenceGroup, nor None: a mesh, say, or a process group."""
    if group is not None and not hasattr(group, "cuts_as"):
        raise ValueError(
            f"group must be a lasp.SequenceGroup or None, got {told(group)}: SequenceGroup.from_mesh makes one of a "
            "mesh, from_group of a process group"
        )


def check_cut(cut: Any, tokens: int, what: str) -> None:
    """Raises ValueError for what is no cut, or one that gives this rank another number of tokens."""
    if not isinstance(cut, Cut):
        raise ValueError(f"cut must be a lasp.Cut, got {told(cut)}")
    if tokens != cut.tokens:
        raise ValueError(
            f"{what}: the cut gives rank {cut.rank} of {cut.size} {cut.tokens} of {cut.total} tokens, got {tokens}"
        )


def even_lengths(total: int, ranks: int, layout: Layout) -> tuple[int, ...]:
    """Every rank's number of tokens in the even cut of a sequence."""
    lengths = [0] * ranks
    for piece in even_pieces(total, ranks, layout):
        lengths[piece.rank] += piece.stop - piece.start
    return tuple(lengths)
