"""Batches: which tokens a rank reads at a step, and nothing else is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from lasp.train.source import MicroBatch


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass(frozen=True)
class Batches:
    """The batches of one rank, as a function of the step number alone: to resume, only the step is needed.

    The corpus is cut into windows of `seq_len` tokens, and each epoch visits all of them in an order of its own.
    Data-parallel ranks take turns at the windows; the sequence-parallel ranks of one of them share a window, and each
    reads its slices of it.
    """

    tokens: np.ndarray
    """The whole corpus, `[tokens]`, usually mapped."""

    seq_len: int
    """Tokens of one whole sequence."""

    slices: Sequence[slice]
    """The ranges of the sequence that this rank holds."""

    batch_size: int = 1
    """Sequences per micro-batch of one data-parallel rank."""

    accumulation: int = 1
    """Micro-batches per step."""

    dp_rank: int = 0
    """This rank's place on the data-parallel axis."""

    dp_size: int = 1
    """Length of the data-parallel axis."""

    seed: int = 0
    """Decides the order of the windows."""

    def windows(self, step: int, micro: int = 0) -> list[int]:
        """The windows that this rank reads in a micro-batch of a step (both 0-based); they start at multiples of
        `seq_len`."""
        count = (len(self.tokens) - 1) // self.seq_len  # the last token of a window needs a target
        first = ((step * self.accumulation + micro) * self.dp_size + self.dp_rank) * self.batch_size
        epochs = (divmod(first + i, count) for i in range(self.batch_size))
        return [int(_shuffled(count, self.seed, epoch)[place]) for epoch, place in epochs]

    def read(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step."""
        return [self._batch(self.windows(step, micro)) for micro in range(self.accumulation)]

    def _batch(self, windows: list[int]) -> MicroBatch:
        pieces = [[self._read(window, piece) for piece in self.slices] for window in windows]
        input_ids = np.stack([np.concatenate([piece[:-1] for piece in row]) for row in pieces])
        shift_labels = np.stack([np.concatenate([piece[1:] for piece in row]) for row in pieces])
        places = np.concatenate([np.arange(piece.start, piece.stop) for piece in self.slices])
        tensors = {
            "input_ids": torch.from_numpy(input_ids),
            "shift_labels": torch.from_numpy(shift_labels),
            "position_ids": torch.from_numpy(places).expand(self.batch_size, -1),
        }
        return MicroBatch(tensors, self.seq_len)

    def _read(self, window: int, piece: slice) -> np.ndarray:
        """A slice of a window and the one token after it, the target of its last."""
        start = window * self.seq_len
        return self.tokens[start + piece.start : start + piece.stop + 1].astype(np.int64)
