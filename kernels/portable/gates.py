"""Gates: the log-decays of neighbouring chunks, and what they come to within a chunk."""

from __future__ import annotations

from functools import cached_property

import torch.nn.functional as F
from torch import Tensor

from lasp.kernels.chunks import ceil_div
from lasp.kernels.decays import decay_factor
from lasp.kernels.portable.masks import DecayMasks

ByBlock = tuple[Tensor, ...]
"""Of each block of a stretch one, in order of time."""


class Gates:
    """Log-decays [n or 1, B or 1, H, C, 1 or K] of a stretch of chunks of one length, and the decays that follow from
    them, made once for the stretch and seen block by block.

    One for all chunks where it is per head, one per channel only for GLA's. chunks: of the stretch, and of a block;
    batch: B; scale: of the queries.
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
        return self._blocks(self._whole)

    @property
    def over_chunk(self) -> Tensor:
        """The same of all blocks, [N, 1, 1 or K]."""
        return self._by_row(self._whole)

    def mask(self, index: int) -> Tensor:
        """The decays between the tokens of a block's chunks, where all channels decay alike [M, C, C]: of its N
        matrices, or of H where all chunks share theirs; until that of another block is asked for."""
        return self._masks(index if len(self._log_decay) > 1 else 0)  # made once where all blocks share it

    @cached_property
    def _masks(self) -> DecayMasks:
        chunks, batch, heads, *_ = self._log_decay.shape
        return DecayMasks(self._log_decay.flatten(0, 2).squeeze(-1), min(chunks, self._size) * batch * heads)

    @cached_property
    def earlier(self) -> Tensor:
        """One where token j stands before token m of a chunk, else zero, [C, C]."""
        length = self._log_decay.shape[-2]
        return self._log_decay.new_ones(length, length).triu_(1)

    def new_sums(self, tokens: int | None = None) -> tuple[Tensor, ByBlock]:
        """Zeros [N, C, 1 or K] of all blocks and of each: sums over what shares a gate. tokens: in the place of C."""
        *_, heads, length, channels = self._log_decay.shape
        rows = self._batch * heads
        total = self._log_decay.new_zeros(self._chunks * rows, tokens or length, channels)
        return total, total.split(self._size * rows)

    @cached_property
    def _from_start(self) -> Tensor:
        return decay_factor(self._log_decay.cumsum(-2))

    @cached_property
    def _whole(self) -> Tensor:
        return decay_factor(self._log_decay.sum(-2, keepdim=True))

    def _blocks(self, decays: Tensor) -> ByBlock:
        """Those of each block's chunks, or the one for all."""
        return decays.split(self._size) if len(decays) > 1 else (decays,) * ceil_div(self._chunks, self._size)

    def _rows(self, decays: Tensor) -> ByBlock:
        """Those of each block's tokens, [N, C, 1 or K]."""
        return self._by_row(decays).split(self._size * self._batch * decays.shape[2])

    def _by_row(self, decays: Tensor) -> Tensor:
        return decays.expand(self._chunks, self._batch, -1, -1, -1).flatten(0, 2)
