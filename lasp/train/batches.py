"""Batches: which tokens a rank reads at a step, and nothing else is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch


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
    """Sequences per step of one data-parallel rank."""

    dp_rank: int = 0
    """This rank's place on the data-parallel axis."""

    dp_size: int = 1
    """Length of the data-parallel axis."""

    seed: int = 0
    """Decides the order of the windows."""

    def windows(self, step: int) -> list[int]:
        """The windows that this rank reads at a step (0-based); windows start at multiples of `seq_len`."""
        count = (len(self.tokens) - 1) // self.seq_len  # the last token of a window needs a target
        first = (step * self.dp_size + self.dp_rank) * self.batch_size
        epochs = (divmod(first + i, count) for i in range(self.batch_size))
        return [int(_shuffled(count, self.seed, epoch)[place]) for epoch, place in epochs]

    def read(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of a step, T being the number of tokens that this rank holds.

        Returns `input_ids`, `shift_labels` (the token after each) and `position_ids` (places in the whole sequence),
        all `[B, T]` int64.
        """
        pieces = [[self._read(window, piece) for piece in self.slices] for window in self.windows(step)]
        input_ids = np.stack([np.concatenate([piece[:-1] for piece in row]) for row in pieces])
        shift_labels = np.stack([np.concatenate([piece[1:] for piece in row]) for row in pieces])
        places = np.concatenate([np.arange(piece.start, piece.stop) for piece in self.slices])
        return {
            "input_ids": torch.from_numpy(input_ids),
            "shift_labels": torch.from_numpy(shift_labels),
            "position_ids": torch.from_numpy(places).expand(self.batch_size, -1),
        }

    def _read(self, window: int, piece: slice) -> np.ndarray:
        """A slice of a window and the one token after it, the target of its last."""
        start = window * self.seq_len
        return self.tokens[start + piece.start : start + piece.stop + 1].astype(np.int64)
