"""Cut: how one batch lies on the ranks of a group. A frozen value, agreed once and passed down.

Every operation that is given a cut sends data and nothing else: what ranks must know of each other is in it, as
integers. What follows from it (plans, halos, rotations, positions) is computed when it is first asked for, and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from lasp.kernels.documents import document_bounds
from lasp.kernels.values import check_values, may_look_at
from lasp.parallel.layout import Layout, Piece, Plan, house_pieces, make_plan, pieces_of

if TYPE_CHECKING:
    from lasp.parallel.group import SequenceGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Cut:
    """How the sequences of one batch lie on the ranks; made by `SequenceGroup.cut`, `lasp.shard_batch` and collators.

    group: the ranks, None for one device alone. lengths: every rank's number of tokens of each sequence. bounds: of
    packed documents in the whole sequence, as in cu_seqlens; None for one document. keys: of the batch, and ids: the
    least and the largest of its input_ids, where whoever made the cut has looked at them.

    Raises ValueError for lengths that the group's layout does not allow, and bounds that do not end where the sequence
    does.
    """

    group: SequenceGroup | None
    lengths: tuple[int, ...]
    bounds: tuple[int, ...] | None = None
    keys: frozenset[str] | None = None
    ids: tuple[int, int] | None = None
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.bounds is not None:
            document_bounds(self.bounds, self.total)
        if self.size > 1 and self.total:
            pieces_of(self.lengths, self.layout)

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
        return self.keep(("positions", device), lambda: self._positions().to(device))

    def _positions(self) -> Tensor:
        bounds = (0, self.total) if self.bounds is None else self.bounds
        counts = torch.cat([torch.arange(stop - start) for start, stop in pairwise(bounds)])
        return torch.cat([counts[:0], *(counts[start:stop] for start, stop in self.parts)])

    def cu_seqlens(self, device: torch.device | None = None) -> Tensor | None:
        """The bounds of documents as a tensor [documents + 1], int32."""
        if self.bounds is None:
            return None
        return self.keep(("cu_seqlens", device), lambda: torch.tensor(self.bounds, dtype=torch.int32).to(device))

    def check_documents(self, cu_seqlens: Tensor | Sequence[int]) -> None:
        """Raises ValueError for other bounds of documents than the cut's. An accelerator is not waited for."""
        own = self.cu_seqlens(cu_seqlens.device if isinstance(cu_seqlens, Tensor) else None)
        given = torch.as_tensor(cu_seqlens)
        wrong = "cu_seqlens are others than those of the batch's cut"
        if own is None or given.shape != own.shape:
            raise ValueError(f"{wrong}: {list(given.shape)}, not {None if own is None else list(own.shape)}")
        if may_look_at(given):
            check_values(given == own, lambda: wrong)

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


def house_lengths(total: int, ranks: int, layout: Layout) -> tuple[int, ...]:
    """Every rank's number of tokens in the house's cut of a sequence."""
    lengths = [0] * ranks
    for piece in house_pieces(total, ranks, layout):
        lengths[piece.rank] += piece.stop - piece.start
    return tuple(lengths)
