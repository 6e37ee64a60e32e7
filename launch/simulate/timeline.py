"""A program played on many ranks: who did what when, which chain of work and messages it took, and a picture of it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lasp.launch.simulate.program import Compute, Program, Start
from lasp.parallel.traffic import Play, Traffic, Trip


class Span(NamedTuple):
    """What a rank did from one moment to another, in seconds. exchange: the one it waited for, by place."""

    name: str
    start: float
    end: float
    exchange: int | None = None


class Segment(NamedTuple):
    """A part of the critical path: work of a rank, or what was on its way to it."""

    rank: int
    name: str
    start: float
    end: float


@dataclass
class Timeline:
    """What became of a program. spans: of each rank, in order, those that took time."""

    program: Program
    spans: list[list[Span]]
    plays: list[Play]
    begun: dict[tuple[int, int], int] = field(default_factory=dict)  # spans ahead of a rank's part in an exchange

    @property
    def seconds(self) -> float:
        """Until the last rank was done."""
        return max(spans[-1].end if spans else 0.0 for spans in self.spans)

    def items(self, rank: int | None = None) -> dict[str, float]:
        """Seconds of a rank by kind of work and of waiting; by default of the one that waited least, whose work the
        others waited for."""
        if rank is None:
            waits = [sum(span.end - span.start for span in own if span.exchange is not None) for own in self.spans]
            rank = min(range(len(waits)), key=waits.__getitem__)
        found: dict[str, float] = defaultdict(float)
        for span in self.spans[rank]:
            found[span.name if span.exchange is None else f"waiting for {span.name}"] += span.end - span.start
        return dict(found)

    def critical_path(self) -> list[Segment]:
        """The chain of work and messages that the step took as long as, in order."""
        rank = max(range(len(self.spans)), key=lambda r: self.spans[r][-1].end if self.spans[r] else 0.0)
        place, path = len(self.spans[rank]) - 1, list[Segment]()
        while place >= 0:
            span = self.spans[rank][place]
            if span.exchange is None:
                path.append(Segment(rank, span.name, span.start, span.end))
                place -= 1
            else:
                rank, legs = self._came(rank, span)
                path += legs
                place = self.begun[span.exchange, rank] - 1
        return path[::-1]

    def _came(self, rank: int, span: Span) -> tuple[int, list[Segment]]:
        """What a rank waited for, last part first, and whose work was behind it."""
        assert span.exchange is not None
        play, end = self.plays[span.exchange], span.end
        trip: Trip | None = play.last.get(rank)
        if trip is None:
            source = rank if play.latest is None else play.latest
            return source, [Segment(rank, span.name, self._begin(span.exchange, source), end)]
        legs = []
        while trip is not None:
            legs.append(Segment(trip.letter.target, span.name, trip.left, end))
            rank, end, trip = trip.letter.source, trip.left, trip.cause
        return rank, legs

    def _begin(self, exchange: int, rank: int) -> float:
        ahead = self.begun[exchange, rank]
        return self.spans[rank][ahead - 1].end if ahead else 0.0

    def write(self, path: Path, node_size: int | None = None) -> None:
        """A trace for chrome://tracing or ui.perfetto.dev: a process per node, a line per rank, arrows for messages,
        and the critical path on a line of its own above them."""
        path.write_text(json.dumps({"traceEvents": list(self._events(node_size))}), encoding="utf-8")

    def _events(self, node_size: int | None) -> Iterator[dict[str, Any]]:
        node = node_size or len(self.spans)
        yield _named("process_name", -1, 0, "critical path")
        for segment in self.critical_path():
            yield _event(f"{segment.name} ({segment.rank})", -1, 0, segment.start, segment.end)
        for rank, spans in enumerate(self.spans):
            if rank % node == 0:
                yield _named("process_name", rank // node, rank, f"node {rank // node}")
            yield _named("thread_name", rank // node, rank, f"rank {rank}")
            for span in spans:
                name = span.name if span.exchange is None else f"waiting for {span.name}"
                yield _event(name, rank // node, rank, span.start, span.end)
        trips = (trip for play in self.plays for trip in play.trips)
        for number, trip in enumerate(trips):
            ends = (("s", trip.letter.source, trip.left), ("f", trip.letter.target, trip.arrived))
            for phase, rank, time in ends:
                place = {"pid": rank // node, "tid": rank, "ts": 1e6 * time}
                yield {"name": "message", "cat": "message", "ph": phase, "bp": "e", "id": number, **place}


def _event(name: str, pid: int, tid: int, start: float, end: float) -> dict[str, Any]:
    return {"name": name, "ph": "X", "pid": pid, "tid": tid, "ts": 1e6 * start, "dur": 1e6 * (end - start)}


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def play(program: Program, ranks: int, traffic: Traffic) -> Timeline:
    """Let ranks carry out a program."""
    timeline = Timeline(program, [[] for _ in range(ranks)], [])
    actors = [_Rank(rank, timeline, traffic) for rank in range(ranks)]
    for place, (_, letters, collectives, relay, final) in enumerate(program.exchanges):
        done = partial(_tell, actors, place)
        timeline.plays.append(Play(letters, collectives, ranks, traffic, relay, final, done))
    for actor in actors:
        actor.go_on()
    traffic.run()
    assert all(actor.place == len(program.operations) for actor in actors), "an exchange never came to its end"
    return timeline


def _tell(actors: list[_Rank], exchange: int, rank: int) -> None:
    actors[rank].arrive(exchange)


class _Rank:
    """One rank at work. place: in the program."""

    def __init__(self, rank: int, timeline: Timeline, traffic: Traffic) -> None:
        self.rank, self.timeline, self.traffic = rank, timeline, traffic
        self.place = 0
        self.here: set[int] = set()  # exchanges that are done for this rank
        self.waiting: tuple[int, float] | None = None  # for which one, since when

    def go_on(self) -> None:
        """Do what can be done at this moment."""
        operations, spans = self.timeline.program.operations, self.timeline.spans[self.rank]
        while self.place < len(operations):
            operation = operations[self.place]
            if isinstance(operation, Compute):
                seconds, now = operation.of(self.rank), self.traffic.now
                self.place += 1
                if seconds:
                    spans.append(Span(operation.name, now, now + seconds))
                    self.traffic.after(seconds, self.go_on)
                    return
            elif isinstance(operation, Start):
                self.place += 1
                self.timeline.begun[operation.exchange, self.rank] = len(spans)
                self.timeline.plays[operation.exchange].ready(self.rank)
            elif operation.exchange in self.here:
                self.place += 1
            else:
                self.waiting = operation.exchange, self.traffic.now
                return

    def arrive(self, exchange: int) -> None:
        """An exchange is done for this rank."""
        self.here.add(exchange)
        if self.waiting is not None and self.waiting[0] == exchange:
            since, now, self.waiting = self.waiting[1], self.traffic.now, None
            if now > since:
                name = self.timeline.program.exchanges[exchange].name
                self.timeline.spans[self.rank].append(Span(name, since, now, exchange))
            self.go_on()
