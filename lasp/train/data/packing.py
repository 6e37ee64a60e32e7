"""Rows: documents laid into sequences of `seq_len` tokens; integers only."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lasp.kernels.chunks import ceil_div

_OPEN = 64


class Piece(NamedTuple):
    """Tokens of one document that stand in a row together."""

    start: int
    """Where they begin in the corpus."""

    stop: int
    """Where they end."""

    goes_on: bool
    """Whether the document has a further token, the target of the last one."""


@dataclass(frozen=True)
class Split:
    """Documents one after another, cut every `seq_len` tokens: every token is in one row, and only the last row has
    room left. Documents [N, 2] begin and end in the corpus."""

    documents: np.ndarray
    ends: np.ndarray
    seq_len: int

    @classmethod
    def make(cls, documents: np.ndarray, seq_len: int) -> "Split":
        return cls(documents, np.cumsum(documents[:, 1] - documents[:, 0]), seq_len)

    def __len__(self) -> int:
        return ceil_div(int(self.ends[-1]), self.seq_len) if len(self.ends) else 0

    def row(self, index: int) -> list[Piece]:
        """The pieces of a row, in order."""
        return self.range(index * self.seq_len, (index + 1) * self.seq_len)

    def range(self, start: int, stop: int) -> list[Piece]:
        """The pieces of a range of the documents laid end to end."""
        first, last = np.searchsorted(self.ends, [start, stop - 1], side="right")
        pieces = []
        for number in range(first, min(int(last), len(self.ends) - 1) + 1):
            begin, end = (int(place) for place in self.documents[number])
            laid = int(self.ends[number]) - end  # from a place in the corpus to one among the laid
            piece_stop = min(end, stop - laid)
            pieces.append(Piece(max(begin, start - laid), piece_stop, piece_stop < end))
        return pieces


@dataclass(frozen=True)
class Fit:
    """Every document goes whole into the first of the open rows that has room for it; longer ones are cut every
    `seq_len` tokens. At most 64 rows are open: the oldest is closed for a new one."""

    pieces: np.ndarray
    """[pieces, 3]: begin, end, whether the document goes on; those of a row together."""

    rows: np.ndarray
    """[rows + 1]: where each row's pieces begin."""

    @classmethod
    def make(cls, documents: np.ndarray, seq_len: int) -> "Fit":
        cut = [
            (start, min(start + seq_len, int(stop)), start + seq_len < stop)
            for begin, stop in documents
            for start in range(int(begin), int(stop), seq_len)
        ]
        room, rows, members = np.zeros(_OPEN, np.int64), np.full(_OPEN, -1), np.zeros(len(cut), np.int64)
        count = 0
        for number, (start, stop, _) in enumerate(cut):
            fits = room >= stop - start
            place = int(fits.argmax()) if fits.any() else count % _OPEN  # rows open and close in turn
            if not fits[place]:
                room[place], rows[place] = seq_len, count
                count += 1
            room[place] -= stop - start
            members[number] = rows[place]
        order = np.argsort(members, kind="stable")
        bounds = np.searchsorted(members[order], np.arange(count + 1))
        return cls(np.asarray(cut, np.int64).reshape(-1, 3)[order], bounds)

    def __len__(self) -> int:
        return len(self.rows) - 1

    def row(self, index: int) -> list[Piece]:
        """The pieces of a row, in order."""
        found = self.pieces[self.rows[index] : self.rows[index + 1]]
        return [Piece(int(start), int(stop), bool(goes_on)) for start, stop, goes_on in found]


@dataclass(frozen=True)
class Stream:
    """Documents one after another that are not kept apart: a row is one text of `seq_len` tokens, the target of its
    last token among the next row's. Only the last row has room left."""

    split: Split

    @classmethod
    def make(cls, documents: np.ndarray, seq_len: int) -> "Stream":
        return cls(Split.make(documents, seq_len))

    def __len__(self) -> int:
        return max(0, ceil_div(int(self.split.ends[-1]) - 1, self.split.seq_len)) if len(self.split.ends) else 0

    def range(self, index: int, start: int, stop: int) -> list[Piece]:
        """The pieces of a range of a row, in order; the one token after a row is the next row's first."""
        first = index * self.split.seq_len
        return self.split.range(first + start, first + stop)

    def row(self, index: int) -> list[Piece]:
        """The pieces of a row, in order."""
        return self.range(index, 0, self.split.seq_len)


Rows = Split | Fit | Stream
PACKINGS: dict[str, type[Rows]] = {"split": Split, "first_fit": Fit, "none": Stream}
"""The ways of laying documents into rows, by the name that `data.packing` has."""


def held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are not trained on: those whose content has a hash in the first part of all hashes, so that equal
    documents are on the same side."""
    return np.asarray(hashes < fraction * 2.0**32)
