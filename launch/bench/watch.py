"""Exchanges by the clock: how long each is on its way, and how long who computes stands waiting for it.

with watched() as watch: ...    every exchange of this process that is made here
with alone(): ...               no exchange: what other ranks would send is made here, in memory of the same size
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Thread, get_ident
from time import perf_counter
from typing import Any, TypeVar, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.parallel import collectives
from lasp.parallel.collectives import Message, Pending
from lasp.parallel.exchange import Flight

T = TypeVar("T")


@dataclass
class Watch:
    """What was seen. works: of torch's; launches: when who computes had started a scan, and went on to compute; waits:
    when it began to wait, and went on."""

    works: list[Work] = field(default_factory=list)
    launches: list[float] = field(default_factory=list)
    waits: list[tuple[float, float]] = field(default_factory=list)
    _computes: int = field(default_factory=get_ident)
    _inside: bool = False

    @property
    def flight(self) -> float:
        """Seconds in which anything was on its way."""
        total = end = 0.0
        for begun, arrived in sorted((work.begun, work.arrived) for work in self.works):
            total += max(0.0, arrived - max(begun, end))
            end = max(end, arrived)
        return total

    @property
    def waited(self) -> float:
        """Seconds that who computes stood still, or did what it could only then."""
        return sum(end - begun for begun, end in self.waits)

    @property
    def after(self) -> float:
        """Seconds, at most, from when who computes had gone on to a scan's first message; negative: it was first."""
        found, since = [], 0.0
        for launched in self.launches:
            first = [work.begun for work in self.works if work.begun >= since]
            found += [min(first) - launched] if first else []
            since = launched
        return max(found, default=0.0)

    @property
    def late(self) -> float:
        """Seconds, at most, that something arrived after who computes had come to wait for it; negative: before."""
        found, since = [], 0.0
        for begun, end in self.waits:
            awaited = [work.arrived for work in self.works if since <= work.begun <= end]
            found += [max(awaited) - begun] if awaited else []
            since = end
        return max(found, default=0.0)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait, if it is one of who computes, and not within another."""
        if self._inside or get_ident() != self._computes:
            yield
            return
        self._inside, begun = True, perf_counter()
        try:
            yield
        finally:
            self._inside = False
            self.waits.append((begun, perf_counter()))


class Work:
    """One of torch's, with a thread that only waits for it."""

    def __init__(self, watch: Watch, work: Any) -> None:
        self.begun = self.arrived = perf_counter()
        self._watch, self._error = watch, cast(Exception | None, None)
        self._thread = Thread(target=self._follow, args=(work,), daemon=True)
        self._thread.start()

    def _follow(self, work: Any) -> None:
        try:
            work.wait()
        except Exception as error:
            self._error = error
        self.arrived = perf_counter()

    def wait(self, limit: timedelta | None = None) -> None:
        """As torch's."""
        with self._watch.waiting():
            self._thread.join(None if limit is None else limit.total_seconds())
        if self._thread.is_alive():
            raise RuntimeError(f"nothing came for {limit}")
        if self._error is not None:
            raise self._error


@contextmanager
def watched() -> Iterator[Watch]:
    """See what is exchanged meanwhile."""
    watch, start, wait = Watch(), Flight.__init__, Flight.wait

    class Seen(Pending[T]):
        def __init__(self, works: list[Any], *rest: Any, **others: Any) -> None:
            followed = [Work(watch, work) for work in works]
            watch.works += followed
            super().__init__(followed, *rest, **others)

    def begin(flight: Flight, *arguments: Any) -> None:
        start(flight, *arguments)
        watch.launches.append(perf_counter())

    def wait_for(flight: Flight) -> Any:
        with watch.waiting():
            return wait(flight)

    with patch.object(collectives, "Pending", Seen), patch.multiple(Flight, __init__=begin, wait=wait_for):
        yield watch


@contextmanager
def alone() -> Iterator[None]:
    """Let each exchange be as much copying as it is without a wire."""
    with patch.multiple(
        collectives,
        gather=_gather,
        broadcast=_broadcast,
        all_reduce=_all_reduce,
        reduce_scatter=_reduce_scatter,
        send=_send,
        receive=_receive,
        rotate=_rotate,
    ):
        yield


def _gather(tensor: Tensor, group: dist.ProcessGroup) -> Pending[Tensor]:
    return Pending([], torch.stack([tensor] * dist.get_world_size(group)))


def _broadcast(tensor: Tensor, source: int, group: dist.ProcessGroup) -> Pending[Tensor]:
    own = dist.get_rank(group) == source
    return Pending([], tensor.contiguous() if own else tensor.zero_())


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup, phase: str) -> Pending[Tensor]:
    return Pending([], tensor)


def _reduce_scatter(tensor: Tensor, group: dist.ProcessGroup, phase: str) -> Pending[Tensor]:
    return Pending([], tensor[0].clone())


def _send(tensor: Tensor, to: int, group: dist.ProcessGroup, tag: int) -> Pending[Tensor]:
    return Pending([], tensor.contiguous())


def _receive(buffer: Tensor, source: int, group: dist.ProcessGroup, tag: int) -> Pending[Tensor]:
    return Pending([], buffer.zero_())


def _rotate(
    outgoing: Sequence[Message], incoming: Sequence[Message], group: dist.ProcessGroup | None, result: T
) -> Pending[T]:
    for message in incoming:
        message.tensor.zero_()
    return Pending([], result)
