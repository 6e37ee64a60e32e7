"""Ranks that are threads of one process and hand tensors to one another in memory: as many as a test likes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import Empty, Queue
from threading import Barrier, BrokenBarrierError, Lock
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from torch import Tensor

import lasp
from lasp.parallel import collectives
from lasp.parallel.collectives import Pending
from lasp.parallel.layout import Layout

T = TypeVar("T")
SECONDS = 20


class Wires:
    """What the ranks hand to one another."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.rows = Barrier(ranks, timeout=SECONDS), [torch.empty(0)] * ranks
        self._messages: dict[Any, Queue[Tensor]] = defaultdict(Queue)
        self._lock = Lock()
        self.sent = 0  # messages so far

    def between(self, source: int, target: int, tag: int) -> Queue[Tensor]:
        with self._lock:
            return self._messages[source, target, tag]

    def put(self, source: int, target: int, tag: int, tensor: Tensor) -> None:
        self.between(source, target, tag).put(tensor)
        with self._lock:
            self.sent += 1


class Place(NamedTuple):
    """Stands for the process group of one rank."""

    wires: Wires
    rank: int


def gather(tensor: Tensor, place: Place) -> Pending[Tensor]:
    place.wires.rows[place.rank] = tensor
    place.wires.barrier.wait()
    rows = torch.stack(place.wires.rows)
    place.wires.barrier.wait()
    return Pending([], rows)


def all_reduce(tensor: Tensor, place: Place, phase: str) -> Pending[Tensor]:
    return Pending([], gather(tensor, place).wait().sum(0))


def all_gather(tensor: Tensor, place: Place, phase: str) -> Pending[Tensor]:
    return gather(tensor, place)


def reduce_scatter(tensor: Tensor, place: Place, phase: str) -> Pending[Tensor]:
    return Pending([], gather(tensor, place).wait().sum(0)[place.rank])


def send(tensor: Tensor, to: int, place: Place, tag: int) -> Pending[Tensor]:
    place.wires.put(place.rank, to, tag, tensor.clone())
    return Pending([], tensor)


def receive(buffer: Tensor, source: int, place: Place, tag: int) -> Pending[Tensor]:
    line = place.wires.between(source, place.rank, tag)
    return Pending([SimpleNamespace(wait=lambda: buffer.copy_(line.get(timeout=SECONDS)))], buffer)


def broadcast(tensor: Tensor, source: int, place: Place) -> Pending[Tensor]:
    if place.rank != source:
        return receive(tensor, source, place, -1)
    for rank in range(len(place.wires.rows)):
        if rank != source:
            send(tensor, rank, place, -1)
    return Pending([], tensor)


def all_to_all(
    parts: list[Tensor], sizes: list[int], peers: Sequence[int], place: Place, phase: str
) -> Pending[list[Tensor]]:
    others = [(part, peer) for part, peer in zip(parts, peers, strict=True) if peer != place.rank]
    for part, peer in others:
        send(part, peer, place, -2)
    lines = {peer: place.wires.between(peer, place.rank, -2) for _, peer in others}
    return Pending([], [lines[p].get(timeout=SECONDS) if p in lines else x for x, p in zip(parts, peers, strict=True)])


@contextmanager
def in_memory() -> Iterator[None]:
    """Let the exchanges of scans, of final states and of halos be those of this file."""
    with pytest.MonkeyPatch.context() as patch:
        for fake in (gather, all_gather, reduce_scatter, broadcast, all_reduce, send, receive, all_to_all):
            patch.setattr(collectives, fake.__name__, fake)
        yield


def run(
    ranks: int,
    function: Callable[[lasp.SequenceGroup], T],
    layout: Layout = "contiguous",
    node_size: int | None = None,
) -> list[T]:
    """What a function of its group returns on every rank. No headers: calls are to be given a cut."""
    wires = Wires(ranks)
    channel: Any = SimpleNamespace(check_whole=lambda: None, broken=None)
    groups: list[Any] = [
        lasp.SequenceGroup(
            Place(wires, rank), None, rank, ranks, layout, checks=False, channel=channel, node_size=node_size
        )
        for rank in range(ranks)
    ]
    with in_memory(), ThreadPoolExecutor(ranks) as pool:
        found = [pool.submit(function, group) for group in groups]
    # A rank that fails lets the others wait in vain: its error is the one to be told.
    for future in sorted(found, key=lambda future: isinstance(future.exception(), Empty | BrokenBarrierError)):
        future.result()
    return [future.result() for future in found]
