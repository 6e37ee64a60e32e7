"""What an exchange would take, from the latency and the bandwidth of the wires; and the scan that `scan="auto"` takes.

    wires = Wires.read(FILE)                what `lasp doctor --probe FILE` measured; or Wires.default(backend)
    seconds(schedule, sizes, wires)         of one schedule, until its last message has arrived
    rounds_seconds(rounds, size, wires)     of rounds of parcels, in which all ranks wait for one another
    choose(there, back, sizes, wires)       the scan that takes least over the links of both ways

A message leaves when all that its sender is sent in earlier steps has arrived; messages to several ranks share their
sender's port, as TCP's do, and each arrives a latency behind its last byte (Hockney's alpha-beta, 1994, with ports). Of
a latency the share that is Python's keeps the port, as the overhead of LogP does (Culler and others, 1993).
What everyone is sent by one collective passes along a ring of all ranks: W - 1 messages one behind the other, each a
hop behind its last byte.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from heapq import heappop, heappush
from itertools import count, groupby
from typing import Any, NamedTuple

from lasp.parallel.remembered import remembered
from lasp.parallel.scan import SCANS, Gather, Scan
from lasp.parallel.schedule import EVERYONE, Links, Message, Schedule, Sizes
from lasp.parallel.wires import Wire, Wires

_log = logging.getLogger(__name__)
WORTH = 0.9
"""Of the time of what is taken by default, the most that another may take to be taken instead."""


@remembered
def seconds(schedule: Schedule, sizes: Sizes, wires: Wires) -> float:
    """What a schedule takes from its start on all ranks until its last message has arrived."""
    collective = [m for m in schedule.messages if m.target == EVERYONE]
    if collective:
        steps = groupby(collective, lambda m: m.step)
        rounds = [tuple(Parcel(m.source, m.target, sizes.of(m)) for m in messages) for _, messages in steps]
        return rounds_seconds(rounds, schedule.links.size, wires, schedule.links.node_size)
    return _Traffic(schedule, sizes, wires).run()


class Parcel(NamedTuple):
    """So many bytes from a rank to another, or by a collective to EVERYONE."""

    source: int
    target: int
    bytes: int


Round = tuple[Parcel, ...]  # what is on its way at once, and all of it there before the next round


def rounds_seconds(rounds: Sequence[Round], size: int, wires: Wires, node_size: int | None = None) -> float:
    """What rounds take over `size` ranks, of which so many neighbours share a node."""
    return sum(_round_seconds(parcels, size, wires, node_size) for parcels in rounds if parcels)


def _round_seconds(parcels: Round, size: int, wires: Wires, node_size: int | None) -> float:
    """As slow as the slowest rank, whose parcels share its port; a collective, as the slowest wire of a ring of all."""
    loads: dict[int, float] = defaultdict(float)
    if parcels[0].target == EVERYONE:
        for parcel in parcels:
            loads[parcel.source] += parcel.bytes
        ring = [wires.between(rank, (rank + 1) % size, node_size) for rank in range(size)]
        return (size - 1) * max(wire.hop + max(loads.values()) / wire.bandwidth for wire in ring)
    latencies: dict[int, float] = defaultdict(float)
    for source, target, length in parcels:
        wire = wires.between(source, target, node_size)
        loads[source] += length / wire.bandwidth
        latencies[source] = max(latencies[source], wire.latency)
    return max(latencies[rank] + load for rank, load in loads.items())


class _Traffic:
    """The messages of a schedule on their way, event by event: those to one rank behind one another, those to several
    side by side."""

    def __init__(self, schedule: Schedule, sizes: Sizes, wires: Wires) -> None:
        self.sizes, self.wires, self.node_size = sizes, wires, schedule.links.node_size
        self.missing: dict[int, list[int]] = defaultdict(list)  # steps of what a rank has yet to be sent
        self.ports: dict[int, _Port] = defaultdict(_Port)
        self.events: list[tuple[float, int, Message | _Port, int]] = []  # an arrival, or a port that may be done
        self.number = count()
        for message in schedule.messages:
            self.ports[message.source].lines[message.target].append(message)
            self.missing[message.target].append(message.step)

    def run(self) -> float:
        """Seconds until the last arrival."""
        now = 0.0
        for rank in list(self.ports):
            self._go_on(rank, now)
        while self.events:
            now, _, event, version = heappop(self.events)
            if isinstance(event, Message):
                self.missing[event.target].remove(event.step)
                self._go_on(event.target, now)
            elif event.version == version:
                self._go_on(event.rank, now)
        return now

    def _go_on(self, rank: int, now: float) -> None:
        """Let a port send on, now that something has left it or come to its rank."""
        port = self.ports[rank]
        port.rank = rank
        for message in port.advance(now):
            wire = self._wire(message)
            self._plan(now + wire.latency - wire.overhead, message)
        ready = min(self.missing[rank], default=math.inf)  # what goes ahead of this step or in it waits for nothing
        for line in port.lines.values():
            if line and line[0].step <= ready and line[0] not in port.moving:
                wire = self._wire(line[0])
                port.moving[line[0]] = wire.overhead + self.sizes.of(line[0]) / wire.bandwidth
        if port.moving:
            self._plan(now + min(port.moving.values()) * len(port.moving), port, port.version)

    def _plan(self, time: float, event: Message | _Port, version: int = 0) -> None:
        heappush(self.events, (time, next(self.number), event, version))

    def _wire(self, message: Message) -> Wire:
        return self.wires.between(message.source, message.target, self.node_size)


class _Port:
    """What a rank sends. lines: by target; moving: the heads that are under way, and what they lack in seconds of the
    whole port."""

    def __init__(self) -> None:
        self.lines: dict[int, deque[Message]] = defaultdict(deque)
        self.moving: dict[Message, float] = {}
        self.rank = self.version = 0
        self.since = 0.0

    def advance(self, now: float) -> list[Message]:
        """What has left by now."""
        share = (now - self.since) / max(len(self.moving), 1)
        self.since, self.version = now, self.version + 1
        self.moving = {message: left - share for message, left in self.moving.items()}
        gone = [message for message, left in self.moving.items() if left <= 1e-9 * share + 1e-15]
        for message in gone:
            del self.moving[message]
            self.lines[message.target].popleft()
        return gone


@remembered
def choose(there: Links, back: Links, sizes: Sizes, wires: Wires) -> Scan:
    """The scan whose schedules over the links `there` and `back` take least together; told once at INFO.

    A gather unless another takes a tenth less: one message, which is on its way for as long as there is to compute.
    """
    found = {scan: _round_trip(scan, there, back, sizes, wires) for scan in _candidates(there, sizes, wires)}
    gather, best = found[Gather()], min(found, key=found.__getitem__)
    chosen = best if found[best] < WORTH * gather else Gather()
    if gather:
        announce('scan="auto"', chosen, f"{there.size} ranks and states of {sizes.state} bytes", found)
    return chosen


def announce(what: str, chosen: object, case: str, found: Mapping[Any, float]) -> None:
    """Say at INFO what was chosen, with the predictions of all: once for each case and choice, whose batches differ."""
    if next(_announced(what, str(chosen), case)) == 0:
        told = ", ".join(f"{name} {1e3 * time:.3g} ms" for name, time in found.items())
        _log.info("%s takes %s for %s: %s", what, chosen, case, told)


@remembered
def _announced(what: str, chosen: str, case: str) -> Iterator[int]:
    """How often it was."""
    return count()


def _candidates(links: Links, sizes: Sizes, wires: Wires) -> Iterator[Scan]:
    for kind in SCANS.values():
        scan = kind()
        try:
            scan.check(links.size, links.node_size)
        except ValueError:
            continue
        yield scan.fitted(links, sizes, wires)


def _round_trip(scan: Scan, there: Links, back: Links, sizes: Sizes, wires: Wires) -> float:
    ways = scan.schedule(there), scan.schedule_back(back, there)
    return sum(seconds(way, sizes, wires) for way in ways)
