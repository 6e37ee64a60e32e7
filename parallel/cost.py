"""What an exchange would take, from the latency and the bandwidth of the wires; and the scan that `scan="auto"` takes.

    wires = Wires.read(FILE)                what `lasp doctor --probe FILE` measured; or Wires.default(backend)
    seconds(schedule, sizes, wires)         of one schedule, until its last message has arrived
    rounds_seconds(rounds, size, wires)     of rounds of parcels, in which all ranks wait for one another
    choose(there, back, sizes, wires)       the scan that takes least over the links of both ways

A message leaves when all that its sender is sent in earlier steps has arrived, and then shares ports (`traffic.py`).
What everyone is sent by one collective passes along a ring of all ranks: W - 1 messages one behind the other, each a
hop behind its last byte.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, groupby
from typing import Any, NamedTuple

from lasp.parallel.remembered import remembered
from lasp.parallel.scan import SCANS, Gather, Scan
from lasp.parallel.schedule import EVERYONE, Links, Schedule, Sizes
from lasp.parallel.traffic import Letter, Play, Traffic
from lasp.parallel.wires import Wires

_log = logging.getLogger(__name__)
WORTH = 0.9
"""Of the time of what is taken by default, the most that another may take to be taken instead."""


@remembered
def seconds(schedule: Schedule, sizes: Sizes, wires: Wires) -> float:
    """What a schedule takes from its start on all ranks until its last message has arrived."""
    traffic, ranks = Traffic(wires, schedule.links.node_size), schedule.links.size
    play = Play(letters_of(schedule, sizes), gathers_of(schedule, sizes, wires), ranks, traffic)
    for rank in range(ranks):
        play.ready(rank)
    return traffic.run()


def letters_of(schedule: Schedule, sizes: Sizes) -> list[Letter]:
    """The messages from one rank to another."""
    return [Letter(m.step, m.source, m.target, sizes.of(m)) for m in schedule.messages if m.target != EVERYONE]


def gathers_of(schedule: Schedule, sizes: Sizes, wires: Wires) -> list[float]:
    """Seconds of its collectives, one behind the other."""
    links, collective = schedule.links, [m for m in schedule.messages if m.target == EVERYONE]
    steps = groupby(collective, lambda m: m.step)
    rounds = [tuple(Parcel(m.source, m.target, sizes.of(m)) for m in messages) for _, messages in steps]
    return [rounds_seconds([parcels], links.size, wires, links.node_size) for parcels in rounds]


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
        return (size - 1) * max(wire.hop + max(loads.values()) / (wire.share * wire.bandwidth) for wire in ring)
    latencies: dict[int, float] = defaultdict(float)
    for source, target, length in parcels:
        wire = wires.between(source, target, node_size)
        loads[source] += length / wire.bandwidth
        latencies[source] = max(latencies[source], wire.latency)
    return max(latencies[rank] + load for rank, load in loads.items())


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
