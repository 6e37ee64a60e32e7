"""Messages on their way between ranks, event by event: a clock, ports that messages share, and the play of a schedule.

    traffic = Traffic(wires, node_size)
    play = Play(letters, collectives, traffic)     of a schedule's messages (`cost.py`), or of any others
    play.ready(rank)                               for each rank; from an event of the traffic or before it runs
    traffic.run()                                  seconds until nothing is under way

Messages that a rank sends to several others at a time share its port, as TCP's do; where nodes have a card, those that
leave a node share its card, and so do those that enter one. Each arrives a latency behind its last byte (Hockney's
alpha-beta, 1994, with ports). Messages between two ranks go one after the other, with a wire's rest between them, as
the gap of LogGP has it (Alexandrov and others, 1995).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import Any, NamedTuple

from lasp.parallel.wires import Wire, Wires

Call = Callable[[], object]


class Traffic:
    """node_size: how many consecutive ranks share a node, None if all do. card: bytes per second and direction of all
    that passes between a node and the others; None: every rank has a wire of its own."""

    def __init__(self, wires: Wires, node_size: int | None = None, card: float | None = None) -> None:
        self.wires, self.node_size, self.card = wires, node_size, card
        self.now = 0.0
        self._number = count()
        self._events: list[tuple[float, int, Call]] = []
        self._lines: dict[tuple[int, int], deque[_Flow]] = defaultdict(deque)
        self._rested: dict[tuple[int, int], float] = defaultdict(float)  # when a line's next message may begin
        self._sharing: dict[Any, list[_Flow]] = defaultdict(list)  # by port or card: who is under way through it

    def after(self, seconds: float, call: Call) -> None:
        """Call in so many seconds; calls of one moment in the order in which they were asked for."""
        heappush(self._events, (self.now + seconds, next(self._number), call))

    def send(self, source: int, target: int, size: float, arrived: Call) -> None:
        """Send so many bytes, behind those on their way from the same rank to the same; call when they arrive."""
        wire = self.wires.between(source, target, self.node_size)
        way = size / wire.bandwidth
        flow = _Flow(wire, way, wire.rest(way), arrived, (source, target), self._shared(source, target))
        line = self._lines[flow.ends]
        line.append(flow)
        if len(line) == 1:
            self._follow(flow)

    def run(self) -> float:
        """Seconds until the last event."""
        while self._events:
            self.now, _, call = heappop(self._events)
            call()
        return self.now

    def _shared(self, source: int, target: int) -> tuple[Any, ...]:
        if self.card is None or self.node_size is None or source // self.node_size == target // self.node_size:
            return (source,)
        return source, ("out", source // self.node_size), ("in", target // self.node_size)

    def _follow(self, flow: _Flow) -> None:
        """Begin the first of a line, a rest behind the one before."""
        rest = self._rested[flow.ends] - self.now
        if rest > 0:
            self.after(rest, partial(self._begin, flow))
        else:
            self._begin(flow)

    def _begin(self, flow: _Flow) -> None:
        flow.since = self.now
        for key in flow.shared:
            self._sharing[key].append(flow)
        self._share(flow.shared)

    def _end(self, flow: _Flow, version: int) -> None:
        if flow.version != version:
            return
        for key in flow.shared:
            self._sharing[key].remove(flow)
        self._share(flow.shared)
        self.after(flow.wire.latency, flow.arrived)
        self._rested[flow.ends] = self.now + flow.rest
        line = self._lines[flow.ends]
        line.popleft()
        if line:
            self._follow(line[0])

    def _share(self, keys: tuple[Any, ...]) -> None:
        """Deal out anew what passes through these."""
        for flow in {id(flow): flow for key in keys for flow in self._sharing[key]}.values():
            port, *cards = (len(self._sharing[key]) for key in flow.shared)
            slowest = self.card / max(cards) if self.card is not None and cards else math.inf
            rate = min(1 / port, slowest / flow.wire.bandwidth)
            if rate != flow.rate:
                flow.left = max(flow.left - (self.now - flow.since) * flow.rate, 0.0)
                flow.since, flow.rate, flow.version = self.now, rate, flow.version + 1
                self.after(flow.left / rate, partial(self._end, flow, flow.version))


@dataclass(eq=False, slots=True)
class _Flow:
    """A message under way. left: seconds of a whole port, at the moment `since`; rest: what the next one waits behind
    it; ends: source and target; shared: what it shares."""

    wire: Wire
    left: float
    rest: float
    arrived: Call
    ends: tuple[int, int]
    shared: tuple[Any, ...]
    rate: float = 0.0
    since: float = 0.0
    version: int = 0


class Letter(NamedTuple):
    """So many bytes on their way from a rank to another; it leaves when its sender has what it is sent in earlier
    steps."""

    step: int
    source: int
    target: int
    size: float


@dataclass(eq=False)
class Trip:
    """A letter that has left. cause: the trip that its sender waited for, None where it waited for its own work."""

    letter: Letter
    left: float
    cause: Trip | None
    arrived: float = math.inf


@dataclass(eq=False)
class Play:
    """An exchange among some ranks, which take part in it when they are ready.

    letters: by step. collectives: of exchanges of all ranks at once, which come before any letter and one behind the
    other, the seconds of each. relay: what a rank takes to put a letter of so many bytes to use before it sends on what
    depends on it, one after another; final: what a rank takes at its end. done: called with each rank that has all.
    """

    letters: Sequence[Letter]
    collectives: Sequence[float]
    ranks: int
    traffic: Traffic
    relay: Callable[[float], float] = lambda size: 0.0
    final: Callable[[int], float] = lambda rank: 0.0
    done: Callable[[int], object] = lambda rank: None
    trips: list[Trip] = field(default_factory=list)
    last: dict[int, Trip] = field(default_factory=dict)  # the trip that arrived last, by rank
    latest: int | None = None  # the rank that was ready last, which a collective waits for

    def __post_init__(self) -> None:
        self._ready: set[int] = set()
        self._free: dict[int, float] = defaultdict(float)  # when a rank has put to use what has come
        self._missing: dict[int, Counter[int]] = defaultdict(Counter)  # letters yet to come, by rank and step
        self._waiting: dict[int, deque[Letter]] = defaultdict(deque)
        for letter in self.letters:
            self._missing[letter.target][letter.step] += 1
            self._waiting[letter.source].append(letter)

    def ready(self, rank: int) -> None:
        """A rank has what it gives of its own."""
        self._ready.add(rank)
        if not self.collectives:
            self._go_on(rank, None)
        elif len(self._ready) == self.ranks:
            self.latest = rank
            self.traffic.after(sum(self.collectives), self._all_done)

    def _all_done(self) -> None:
        for rank in range(self.ranks):
            self.traffic.after(self.final(rank), partial(self.done, rank))

    def _go_on(self, rank: int, cause: Trip | None) -> None:
        """Send what a rank can send now."""
        if rank not in self._ready:
            return
        missing, waiting = self._missing[rank], self._waiting[rank]
        ready = min(missing) if missing else math.inf  # what goes ahead of this step or in it waits for nothing
        while waiting and waiting[0].step <= ready:
            trip = Trip(waiting.popleft(), self.traffic.now, cause)
            self.trips.append(trip)
            letter = trip.letter
            self.traffic.send(letter.source, letter.target, letter.size, partial(self._arrive, trip))
        if not missing:
            self.traffic.after(self.final(rank), partial(self.done, rank))

    def _arrive(self, trip: Trip) -> None:
        rank, now = trip.letter.target, self.traffic.now
        trip.arrived = now
        taken = self.relay(trip.letter.size)
        self._free[rank] = max(self._free[rank], now) + taken
        if taken:
            self.traffic.after(self._free[rank] - now, partial(self._used, trip))
        else:
            self._used(trip)

    def _used(self, trip: Trip) -> None:
        rank, missing = trip.letter.target, self._missing[trip.letter.target]
        missing[trip.letter.step] -= 1
        if not missing[trip.letter.step]:
            del missing[trip.letter.step]
        self.last[rank] = trip
        self._go_on(rank, trip)
