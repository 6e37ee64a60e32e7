"""Source: what the loop asks of the data."""

from typing import NamedTuple, Protocol

from torch import Tensor

from lasp.parallel.batch import IGNORE_INDEX


class MicroBatch(NamedTuple):
    """This rank's part of some sequences."""

    tensors: dict[str, Tensor]
    """`input_ids`, `shift_labels` (the target of each, -100 for none) and `position_ids`, [B, T] int64."""

    length: int
    """Tokens of each whole sequence, over all ranks that share it."""

    bounds: tuple[int, ...] | None = None
    """Of the documents of the one whole sequence, as in cu_seqlens; None where it is one document."""

    @property
    def targets(self) -> int:
        """How many of this rank's tokens have one."""
        return int((self.tensors["shift_labels"] != IGNORE_INDEX).sum())


class Source(Protocol):
    """The data of a run as a function of the step: to resume, only the step is needed."""

    def read(self, step: int) -> list[MicroBatch]:
        """The micro-batches of this rank at a step (0-based). Together the ranks read the same tokens whatever dp and
        sp are, as long as dp x batch_size x accumulation is the same."""
