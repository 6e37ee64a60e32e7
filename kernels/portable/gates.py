"""Gates: the log-decays of neighbouring chunks, and what they come to within a chunk."""

from __future__ import annotations

from functools import cached_property

import torch.nn.functional as F
from torch import Tensor

from lasp.kernels.chunks import Block
from lasp.kernels.decays import decay_factor


class Gates:
    """Log-decays [n or 1, B or 1, H, C, 1 or K] of a stretch of chunks of one length, and the decays that follow from
    them, each made once for all blocks of the stretch.

    One for all chunks where it is per head, one per channel only for GLA's. start: the first token of the first chunk.
    """

    def __init__(self, log_decay: Tensor, start: int) -> None:
        self.log_decay, self._start = log_decay, start

    @property
    def per_channel(self) -> bool:
        """Whether each channel decays by its own."""
        return self.log_decay.shape[-1] > 1

    @cached_property
    def from_start(self) -> Tensor:
        """The decay between the chunk's start and each token, its own included."""
        return decay_factor(self.log_decay.cumsum(-2))

    @cached_property
    def to_end(self) -> Tensor:
        """The decay between each token and the chunk's end: summed from behind, for a difference would cancel."""
        later = self.log_decay.flip(-2).cumsum(-2).flip(-2)
        return decay_factor(F.pad(later[..., 1:, :], (0, 0, 0, 1)))

    @cached_property
    def whole(self) -> Tensor:
        """The decay over the whole chunk, one row."""
        return decay_factor(self.log_decay.sum(-2, keepdim=True))

    @cached_property
    def sums(self) -> tuple[Tensor, Tensor]:
        """Running sums of one log-decay per token, [n or 1, B or 1, H, C], in two parts to be added.

        One near -3000 in fp32 has steps of 2e-4: it is fp64, and the second part is what the first leaves of it.
        """
        sums = self.log_decay.squeeze(-1).double().cumsum(-1)
        high = sums.to(self.log_decay.dtype)
        return high, (sums - high).to(high.dtype)

    def of(self, block: Block, decays: Tensor) -> Tensor:
        """A block's part of one of these."""
        first = (block.start - self._start) // block.length
        return decays if len(decays) == 1 else decays[first : first + block.chunks]
