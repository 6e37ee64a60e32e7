"""What a schedule would take: latency and bandwidth of each kind of wire, and ports that send one message at a time.

    wires = Wires.read(FILE)                    what `lasp doctor --probe FILE` measured; or Wires.default(backend)
    seconds(schedule, sizes, wires)             of one scan, until its last message has arrived
    predictions(scans, links, sizes, wires)     of several, the cheapest first

A message leaves when what it is made of has arrived and the port of its sender is free; it keeps that port for
bytes / bandwidth, and arrives a latency later (Hockney's alpha-beta, 1994, with ports). What everyone is sent by one
collective passes along a ring of all ranks: W - 1 messages one behind the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from lasp.parallel.remembered import remembered
from lasp.parallel.scan import Scan
from lasp.parallel.schedule import EVERYONE, Links, Message, Schedule, Sizes


class Wire(NamedTuple):
    """latency: seconds of the shortest message; bandwidth: bytes per second and direction of a long one."""

    latency: float
    bandwidth: float


class Wires(NamedTuple):
    """The wire between two ranks of a node, and that between ranks of different nodes."""

    node: Wire
    network: Wire

    @staticmethod
    def default(backend: str) -> Wires:
        """Where nothing was measured: for "nccl" NVLink of an H100 at 450 GB/s and InfiniBand NDR at 50 GB/s, their
        data sheets' figures per GPU and direction; else processes of one machine and Ethernet at 10 Gbit/s."""
        if backend == "nccl":
            return Wires(Wire(10e-6, 450e9), Wire(20e-6, 50e9))
        return Wires(Wire(100e-6, 1e9), Wire(200e-6, 1.25e9))

    @staticmethod
    def read(path: Path | str) -> Wires:
        """From a file of `lasp doctor --probe`. Raises ValueError, naming the file, where it is none."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))["links"]
            node = Wire(**{name: float(found["node"][name]) for name in Wire._fields})
            network = {name: float(found.get("network", found["node"])[name]) for name in Wire._fields}
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is no file of `lasp doctor --probe`: {error!r}") from error
        return Wires(node, Wire(**network))

    def between(self, source: int, target: int, node_size: int | None) -> Wire:
        """The wire between two ranks; node_size: how many consecutive ones share a node, None if all do."""
        return self.node if node_size is None or source // node_size == target // node_size else self.network


@remembered
def seconds(schedule: Schedule, sizes: Sizes, wires: Wires) -> float:
    """What a schedule takes from its start on all ranks until its last message has arrived."""
    ranks = _Ports(schedule.links, sizes, wires)
    for _, messages in groupby(schedule.messages, lambda m: m.step):
        together = list(messages)
        if together[0].target == EVERYONE:
            ranks.gather(together)
        else:
            for message in together:
                ranks.send(message)
    return max(ranks.ends, default=0.0)


@dataclass
class _Ports:
    """When each rank's port is free, and when what it was sent has arrived."""

    links: Links
    sizes: Sizes
    wires: Wires

    def __post_init__(self) -> None:
        self.free = [0.0] * self.links.size
        self.arrived: list[list[tuple[int, float]]] = [[] for _ in range(self.links.size)]
        self.ends: list[float] = []

    def send(self, message: Message) -> None:
        wire = self.wires.between(message.source, message.target, self.links.node_size)
        start = max(self.free[message.source], self._ready(message.source, message.step))
        self.free[message.source] = start + self.sizes.of(message) / wire.bandwidth
        self._arrive(message.target, message.step, self.free[message.source] + wire.latency)

    def gather(self, messages: list[Message]) -> None:
        """All ranks at once: as slow as the slowest wire of their ring."""
        size, step = self.links.size, messages[0].step
        start = max(max(self.free), *(self._ready(rank, step) for rank in range(size)))
        wires = [self.wires.between(rank, (rank + 1) % size, self.links.node_size) for rank in range(size)]
        longest = max(sum(self.sizes.of(m) for m in messages if m.source == rank) for rank in range(size))
        end = start + (size - 1) * max(wire.latency + longest / wire.bandwidth for wire in wires)
        for rank in range(size):
            self.free[rank] = end
            self._arrive(rank, step, end)

    def _ready(self, rank: int, step: int) -> float:
        """When everything that a rank was sent in earlier steps is there."""
        return max((time for sent, time in self.arrived[rank] if sent < step), default=0.0)

    def _arrive(self, rank: int, step: int, time: float) -> None:
        self.arrived[rank].append((step, time))
        self.ends.append(time)


def predictions(scans: Iterable[Scan], links: Links, sizes: Sizes, wires: Wires) -> dict[Scan, float]:
    """Seconds of each scan, with the options that fit; the cheapest first, and of equals the one that came first."""
    fitted = [scan.fitted(links, sizes) for scan in scans]
    found = {scan: seconds(scan.schedule(links), sizes, wires) for scan in fitted}
    return dict(sorted(found.items(), key=lambda item: item[1]))
