"""Chain: the states between parts of each run, in the order in which they follow from one another.

Forwards they are states S, backwards gradients of states, and a chain knows its direction: a run's map, what enters it
and what leaves it are meant in that order. Every implementation has a chain of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from lasp.kernels.segment import Segment, transpose


class Chain(ABC):
    """States [..., B, H, K, V]. Of each run's map alone until `enter` or `fill` makes them the true ones."""

    reverse: bool
    """Whether it runs from the end of each run to its start, with gradients."""

    @abstractmethod
    def segment(self, run: int) -> Segment:
        """The map of a whole run."""

    @abstractmethod
    def enter(self, incoming: list[Tensor | None]) -> None:
        """Let a state [B, H, K, V] enter each run; None is an empty memory."""

    @abstractmethod
    def fill(self, runs: list[Tensor]) -> None:
        """Let every token of a run read one state [B, H, K, V]: attention without a mask."""

    @abstractmethod
    def leaving(self) -> list[Tensor]:
        """The state [B, H, K, V] that leaves each run."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What has to be kept to restore the chain."""


# States at the chunks, what the tokens write (or its gradient), and states that leave the segments.
Pass = tuple[Any, Any, Tensor]


class SegmentChain(Chain):
    """States [segments, B, H, K, V] that enter segments: stretches of chunks that one card carries at the same time.

    They join as ranks are joined, and are all that is kept from forward to backward. Those between chunks follow from
    them in one more pass over keys and values, which is also how a state that arrives from another rank enters.
    runs: first segment of each run and the one behind its last.
    """

    reverse = False

    def __init__(self, runs: tuple[tuple[int, int], ...]) -> None:
        self._runs = runs
        self._entered = False
        self._entering: Tensor | None = None
        self._filled: Tensor | None = None
        self._made: dict[str, Any] = {}

    @abstractmethod
    def carry(self, starts: Tensor | None, store: bool) -> Pass:
        """One pass through all segments from the states that enter them (None: zeros), storing those at the chunks."""

    @abstractmethod
    def make_transfers(self) -> Tensor:
        """What each segment does to a state that enters it, forwards: [segments, B, H, 1 or K, 1 or K]."""

    @property
    def transfers(self) -> Tensor:
        """The same, made once."""
        return self._once("transfers", self.make_transfers)

    @property
    def _empty(self) -> Tensor:
        return self._once("empty", lambda: self.carry(None, False)[2])

    @property
    def _true(self) -> Pass:
        assert self._entered, "what enters the runs is known by now"
        return self._once("true", lambda: self.carry(self._entering, True))

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """What torch.compile can trace of a cached property."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @property
    def states(self) -> Tensor:
        """The state that enters each chunk, or the gradient that leaves it; of a chain that was filled, each run's."""
        return self._true[0] if self._filled is None else self._filled

    @property
    def written(self) -> Tensor:
        """What the tokens write, of the delta family; backwards its gradient."""
        return self._true[1]

    def segment(self, run: int) -> Segment:
        maps = inclusive(self._maps(run))
        return Segment(maps.transfer[-1], maps.state[-1])

    def enter(self, incoming: list[Tensor | None]) -> None:
        self._entered = True
        if any(last - first > 1 for first, last in self._runs):
            self._entering = torch.cat([self._join(run, state) for run, state in enumerate(incoming)])
            return
        given = [state for state in incoming if state is not None]
        if given:
            self._entering = torch.stack([torch.zeros_like(given[0]) if x is None else x for x in incoming])

    def fill(self, runs: list[Tensor]) -> None:
        self._filled = torch.stack(runs)

    def leaving(self) -> list[Tensor]:
        if not self._entered:
            return [self.segment(run).state for run in range(len(self._runs))]
        return [self._true[2][first if self.reverse else last - 1] for first, last in self._runs]

    def tensors(self) -> tuple[Tensor, ...]:
        """Nothing where the chain is one segment from an empty memory."""
        kept = self._entering if self._filled is None else self._filled
        return () if kept is None else (kept,)

    def restore(self, tensors: tuple[Tensor, ...], filled: bool) -> Self:
        """This chain again, from what `tensors` returned; filled: `fill` had been called."""
        (kept,) = tensors or (None,)
        self._entered, self._entering, self._filled = True, None if filled else kept, kept if filled else None
        return self

    def _join(self, run: int, incoming: Tensor | None) -> Tensor:
        """The state that enters each segment of a run, given the one that enters the run."""
        maps = self._maps(run)
        first = torch.zeros_like(maps.state[:1]) if incoming is None else incoming.unsqueeze(0)
        states = torch.cat([first, inclusive(maps)(first)[:-1]])
        return states.flip(0) if self.reverse else states

    def _maps(self, run: int) -> Segment:
        """Those of a run's segments, in the order in which the chain passes them."""
        own = slice(*self._runs[run])
        if not self.reverse:
            return Segment(self.transfers[own], self._empty[own])
        return Segment(transpose(self.transfers[own]).flip(0), self._empty[own].flip(0))


def inclusive(maps: Segment) -> Segment:
    """The maps of the first 1, 2, 3, ... of consecutive stretches [stretches, ...], in log2 steps."""
    step, count = 1, len(maps.state)
    while step < count:
        earlier, later = (
            Segment(maps.transfer[:-step], maps.state[:-step]),
            Segment(maps.transfer[step:], maps.state[step:]),
        )
        both = earlier.then(later)
        maps = Segment(torch.cat([maps.transfer[:step], both.transfer]), torch.cat([maps.state[:step], both.state]))
        step *= 2
    return maps
