"""Gates: the log-decays of neighbouring chunks, and what they come to within a chunk."""

from __future__ import annotations

from functools import cached_property

import torch.nn.functional as F
from torch import Tensor

from lasp.kernels.chunks import ceil_div
from lasp.kernels.decays import decay_factor

ByBlock = tuple[Tensor, ...]
"""Of each block of a stretch one, in order of time."""


class Gates:
    """Log-decays [n or 1, B or 1, H, C, 1 or K] of a stretch of chunks of one length, and the decays that follow from
    them, made once for the stretch and seen block by block.

    One for all chunks where it is per head, one per channel only for GLA's. chunks: of the stretch, and of a block (its
    last may have fewer); batch: B; scale: of the queries.
    """

    def __init__(self, log_decay: Tensor, chunks: tuple[int, int], batch: int, scale: float) -> None:
        self._log_decay, (self._chunks, self._size), self._batch, self._scale = log_decay, chunks, batch, scale

    @property
    def per_channel(self) -> bool:
        """Whether each channel decays by its own."""
        return self._log_decay.shape[-1] > 1

    @cached_property
    def log_decay(self) -> ByBlock:
        """As given."""
        return self._blocks(self._log_decay)

    @cached_property
    def from_start(self) -> ByBlock:
        """The decay between the chunk's start and each token, its own included, [N, C, 1 or K]."""
        return self._rows(self._from_start)

    @cached_property
    def to_query(self) -> ByBlock:
        """The same times the queries' scale."""
        return self._rows(self._from_start * self._scale)

    @cached_property
    def to_end(self) -> ByBlock:
        """The decay between each token and the chunk's end, [N, C, 1 or K]: summed from behind, for a difference would
        cancel."""
        later = self._log_decay.flip(-2).cumsum(-2).flip(-2)
        return self._rows(decay_factor(F.pad(later[..., 1:, :], (0, 0, 0, 1))))

    @cached_property
    def whole(self) -> ByBlock:
        """The decay over the whole chunk, [n or 1, B or 1, H, 1, 1 or K]."""
        return self._blocks(decay_factor(self._log_decay.sum(-2, keepdim=True)))

    @cached_property
    def sums(self) -> tuple[ByBlock, ByBlock]:
        """Running sums of one log-decay per token, [n or 1, B or 1, H, C], in two parts to be added.

        One near -3000 in fp32 has steps of 2e-4: it is fp64, and the second part is what the first leaves of it.
        """
        sums = self._log_decay.squeeze(-1).double().cumsum(-1)
        high = sums.to(self._log_decay.dtype)
        return self._blocks(high), self._blocks((sums - high).to(high.dtype))

    @cached_property
    def _from_start(self) -> Tensor:
        return decay_factor(self._log_decay.cumsum(-2))

    def _blocks(self, decays: Tensor) -> ByBlock:
        """Those of each block's chunks, or the one for all."""
        return decays.split(self._size) if len(decays) > 1 else (decays,) * ceil_div(self._chunks, self._size)

    def _rows(self, decays: Tensor) -> ByBlock:
        """Those of each block's tokens, [N, C, 1 or K]."""
        rows = decays.expand(self._chunks, self._batch, -1, -1, -1).flatten(0, 2)
        return rows.split(self._size * self._batch * decays.shape[2])
