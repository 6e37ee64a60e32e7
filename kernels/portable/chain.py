"""The chain of the portable kernels: the states between all chunks, kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lasp.kernels.chain import Chain
from lasp.kernels.chunks import Block
from lasp.kernels.segment import Segment, apply, transpose


@dataclass
class ChunkChain(Chain):
    """States between chunks [slots, B, H, K, V] and each chunk's own transfer [slots, B or 1, H or 1, 1 or K, 1 or K].

    In reverse `states` holds gradients, and transfers are the same. runs: the first and the last slot of each; base:
    the slot of the first state held.
    """

    runs: tuple[tuple[int, int], ...]
    states: Tensor
    transfers: Tensor
    reverse: bool = field(default=False, kw_only=True)
    base: int = field(default=0, kw_only=True)
    _seen: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def segment(self, run: int) -> Segment:
        first, last = self.runs[run]
        if self.reverse:
            return Segment(transpose(self._whole(first, last)), self.states[first])
        return Segment(self._whole(first, last), self.states[last])

    def enter(self, incoming: list[Tensor | None]) -> None:
        """Add to every state of each run what the state entering the run has become by then."""
        self.states = self.states.clone()  # not in place: selective checkpointing may keep what an operator returned
        self._seen.clear()
        for (first, last), carry in zip(self.runs, incoming, strict=True):
            if carry is not None:
                slots = range(last, first - 1, -1) if self.reverse else range(first, last + 1)
                self.states[slots[0]].add_(carry)
                for before, after in pairwise(slots):
                    transfer = self.transfers[min(before, after)]
                    carry = apply(transpose(transfer) if self.reverse else transfer, carry)
                    self.states[after].add_(carry)

    def fill(self, runs: list[Tensor]) -> None:
        counts = (last + 1 - first for first, last in self.runs)
        self.states = torch.cat([x.expand(n, *x.shape) for n, x in zip(counts, runs, strict=True)])
        self._seen.clear()

    def leaving(self) -> list[Tensor]:
        return [self.states[first if self.reverse else last] for first, last in self.runs]

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.states, self.transfers

    # A block of chunks ------------------------------------------------------------------------------------------------

    def at_starts(self, block: Block) -> Tensor:
        """The states at the start of the block's chunks, [N, K, V]."""
        return self._matrices(block.slot - self.base, block.chunks)

    def at_ends(self, block: Block) -> Tensor:
        """The states at the end of the block's chunks, [N, K, V]."""
        return self._matrices(block.slot - self.base + 1, block.chunks)

    def around(self, block: Block) -> tuple[Tensor, ...]:
        """The states at the start of each of the block's chunks and at the end of the last, [B·H, K, V] each."""
        first = block.slot - self.base
        return self.states[first : first + block.chunks + 1].flatten(1, 2).unbind()

    def link(self, block: Block) -> None:
        """Carry the state across the block's chunks, each of which holds what it adds by itself."""
        first, stop = block.slot - self.base, block.slot - self.base + block.chunks
        states, transfers = self._each("states"), self._each("transfers")[block.slot : block.slot + block.chunks]
        steps = list(zip(states[first:stop], transfers, states[first + 1 : stop + 1], strict=True))
        for before, transfer, after in reversed(steps) if self.reverse else steps:
            source, target = (after, before) if self.reverse else (before, after)
            if transfer.shape[-1] == 1:
                target.addcmul_(transfer, source)
            else:
                target.add_((transfer.mT if self.reverse else transfer) @ source)

    def _matrices(self, first: int, count: int) -> Tensor:
        """So many of the states held, [N, K, V], seen once: a view is a call of torch as any other."""
        if (first, count) not in self._seen:
            self._seen[first, count] = self.states[first : first + count].flatten(0, 2)
        view: Tensor = self._seen[first, count]
        return view

    def _each(self, name: str) -> tuple[Tensor, ...]:
        """All states held or all transfers, one by one."""
        if name not in self._seen:
            self._seen[name] = getattr(self, name).unbind()
        views: tuple[Tensor, ...] = self._seen[name]
        return views

    def _whole(self, first: int, last: int) -> Tensor:
        """The transfer of the chunks from one slot to another, forwards."""
        if self.transfers.shape[-1] == 1:
            return self.transfers[first:last].prod(0)
        eye = torch.eye(self.transfers.shape[-1], dtype=self.transfers.dtype, device=self.transfers.device)
        return reduce(
            lambda before, own: own @ before, self.transfers[first:last], eye.expand(self.transfers.shape[1:])
        )
