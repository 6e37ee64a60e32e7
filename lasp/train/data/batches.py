"""Batches: which rows a rank reads at a step, and nothing else is read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lasp.kernels.chunks import ceil_div
from lasp.parallel.batch import IGNORE_INDEX
from lasp.train.data.corpus import Corpus
from lasp.train.data.packing import Piece, Rows, Stream
from lasp.train.source import MicroBatch

Slices = Callable[[int], list[slice]]
"""The ranges of a sequence of some length that this rank holds."""

_ROUND = 1024  # rows among which the shares of a mixture are kept


class Data(NamedTuple):
    """A corpus, and the rows of `seq_len` tokens that its documents are laid into."""

    corpus: Corpus
    rows: Rows
    seq_len: int


Row = tuple[Data, int] | None
"""A row of some data; None for one without a target."""


@dataclass(frozen=True)
class Share:
    """What one rank reads of the rows of a step: data-parallel ranks take turns at micro-batches, and the ranks of one
    sequence read their slices of the same rows."""

    slices: Slices
    """The ranges of a sequence that this rank holds."""

    batch_size: int = 1
    """Rows per micro-batch of one data-parallel rank."""

    dp_rank: int = 0
    """This rank's place on the data-parallel axis."""

    dp_size: int = 1
    """Length of the data-parallel axis."""

    def numbers(self, turn: int) -> range:
        """Which of all rows are this rank's in the `turn`-th micro-batch of the run."""
        first = (turn * self.dp_size + self.dp_rank) * self.batch_size
        return range(first, first + self.batch_size)


@dataclass(frozen=True)
class Batches:
    """The batches of one rank, as a function of the step alone.

    Each epoch of a corpus visits all of its rows in an order of its own. A step takes the next dp x batch_size x
    accumulation rows of the mixture, whoever reads them.
    """

    mixture: Sequence[tuple[Data, float]]
    """What is read, each with the share of all rows that it gives."""

    share: Share
    """What this rank reads."""

    accumulation: int = 1
    """Micro-batches per step."""

    seed: int = 0
    """Decides the order of the rows."""

    def read(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step (0-based)."""
        turns = range(step * self.accumulation, (step + 1) * self.accumulation)
        return [lay([self.row(number) for number in self.share.numbers(turn)], self.share.slices) for turn in turns]

    def row(self, number: int) -> tuple[Data, int]:
        """The `number`-th row of the run."""
        which, before = _turn(number, tuple(weight for _, weight in self.mixture), self.seed)
        data = self.mixture[which][0]
        epoch, place = divmod(before, len(data.rows))
        return data, int(_shuffled(len(data.rows), self.seed, epoch, *([which] if which else []))[place])


def all_rows(data: Data, share: Share, limit: int | None = None) -> Iterator[MicroBatch]:
    """Every row of some data once, in order, or so many; the last ones are filled up with rows without a target."""
    count = min(len(data.rows), limit or len(data.rows))
    for turn in range(ceil_div(count, share.dp_size * share.batch_size)):
        yield lay([(data, i) if i < count else None for i in share.numbers(turn)], share.slices, data)


def lay(rows: Sequence[Row], slices: Slices, like: Data | None = None) -> MicroBatch:
    """This rank's part of some rows: laid end to end, every piece of a document by itself, and so the room that a row
    has left; or beside each other, where documents are not kept apart. like: what the rows are of, if all are None."""
    data = next((row[0] for row in rows if row is not None), like)
    assert data is not None
    return _beside(rows, data, slices) if isinstance(data.rows, Stream) else _end_to_end(rows, data.seq_len, slices)


def _end_to_end(rows: Sequence[Row], seq_len: int, slices: Slices) -> MicroBatch:
    laid: list[tuple[Corpus, Piece] | None] = []
    bounds = [0]
    for number, row in enumerate(rows):
        for piece in [] if row is None else row[0].rows.row(row[1]):
            laid.append((row[0].corpus, piece))  # type: ignore[index]
            bounds.append(bounds[-1] + piece.stop - piece.start)
        if bounds[-1] < (number + 1) * seq_len:
            laid.append(None)
            bounds.append((number + 1) * seq_len)
    parts = [_range(laid, bounds, part) for part in slices(bounds[-1])]
    tensors = {name: torch.cat([part[name] for part in parts])[None] for name in parts[0]}
    return MicroBatch(tensors, bounds[-1], tuple(bounds))


def _range(laid: list[tuple[Corpus, Piece] | None], bounds: list[int], part: slice) -> dict[str, Tensor]:
    ids = np.zeros(part.stop - part.start, np.int64)
    labels, positions = np.full_like(ids, IGNORE_INDEX), np.zeros_like(ids)
    for number in range(int(np.searchsorted(bounds, part.start, side="right")) - 1, len(laid)):
        begin, end = bounds[number], bounds[number + 1]
        low, high = max(begin, part.start), min(end, part.stop)
        if low >= high:
            break
        positions[low - part.start : high - part.start] = np.arange(low - begin, high - begin)
        if (found := laid[number]) is not None:
            corpus, piece = found
            further = int(high < end or piece.goes_on)  # whose last token has a target
            read, spoken = corpus.read(piece.start + low - begin, piece.start + high - begin + further)
            ids[low - part.start : high - part.start] = read[: high - low]
            targets = np.where(spoken, read, IGNORE_INDEX)[1:]
            labels[low - part.start : low - part.start + len(targets)] = targets
    return {
        "input_ids": torch.from_numpy(ids),
        "shift_labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
    }


def _beside(rows: Sequence[Row], data: Data, slices: Slices) -> MicroBatch:
    own = slices(data.seq_len)
    read = [[_stretch(row, part) for part in own] for row in rows]
    ids, labels = (np.stack([np.concatenate([part[which] for part in row]) for row in read]) for which in (0, 1))
    positions = np.concatenate([np.arange(part.start, part.stop) for part in own])
    tensors = {
        "input_ids": torch.from_numpy(ids),
        "shift_labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions).expand(len(rows), -1),
    }
    return MicroBatch(tensors, data.seq_len)


def _stretch(row: Row, part: slice) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a range of a row and their targets: the one token after it is read too."""
    ids = np.zeros(part.stop - part.start + 1, np.int64)
    targets, at = np.full_like(ids, IGNORE_INDEX), 0
    if row is not None:
        data, index = row
        assert isinstance(data.rows, Stream)
        for piece in data.rows.range(index, part.start, part.stop + 1):
            own = slice(at, at := at + piece.stop - piece.start)
            ids[own], spoken = data.corpus.read(piece.start, piece.stop)
            targets[own] = np.where(spoken, ids[own], IGNORE_INDEX)
    return ids[:-1], targets[1:]


@lru_cache(maxsize=8)
def _shuffled(count: int, *seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(count)


def _turn(number: int, weights: tuple[float, ...], seed: int) -> tuple[int, int]:
    """Which part of a mixture gives the `number`-th row, and how many it gave before."""
    if len(weights) == 1:
        return 0, number
    counts = shares(weights)
    rounds, place = divmod(number, _ROUND)
    order = _round(counts, seed, rounds)
    which = int(order[place])
    return which, rounds * counts[which] + int((order[:place] == which).sum())


@lru_cache(maxsize=8)
def _round(counts: tuple[int, ...], seed: int, rounds: int) -> np.ndarray:
    return np.random.default_rng([seed, rounds, len(counts)]).permutation(np.repeat(np.arange(len(counts)), counts))


@lru_cache(maxsize=8)
def shares(weights: tuple[float, ...]) -> tuple[int, ...]:
    """How many of every 1024 rows each part of a mixture gives: as the weights say, rounded to a sum of 1024.

    ValueError for weights that are not positive, or too small to give a row.
    """
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"the weights of data.source must be positive numbers, got {list(weights)}")
    exact = np.asarray(weights) / sum(weights) * _ROUND
    counts = np.floor(exact).astype(int)
    for index in np.argsort(counts - exact, kind="stable")[: _ROUND - int(counts.sum())]:
        counts[index] += 1
    if not counts.all():
        raise ValueError(f"a weight of data.source is less than 1/{_ROUND} of all: {list(weights)}")
    return tuple(int(count) for count in counts)
