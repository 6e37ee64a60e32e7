"""What connects the ranks of a group: latency and bandwidth, measured or taken from data sheets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple


class Wire(NamedTuple):
    """The way from a rank to another.

    latency: seconds of the shortest message between two ranks, from and to Python. bandwidth: bytes per second and
    direction of a long one. hop: seconds that a collective of short messages takes for each further rank: without
    Python between them, a fifth of the latency where nobody has measured it. share: of the bandwidth, what a collective
    reaches, with what its ranks do to put to use what has come. gap: seconds between the ends of short messages that
    follow one another while all ranks do so; None where nobody has measured it.
    """

    latency: float
    bandwidth: float
    hop: float
    share: float = 1.0
    gap: float | None = None

    def __str__(self) -> str:
        return f"{self.latency * 1e6:.0f} us, {self.bandwidth / 1e9:.2f} GB/s"

    @property
    def overhead(self) -> float:
        """Seconds that a short message keeps the next one waiting: the gap, or what Python has of the latency, which is
        what a collective does without."""
        return max(self.latency - self.hop, 0.0) if self.gap is None else self.gap

    def rest(self, way: float) -> float:
        """Seconds that the next message waits behind one whose bytes take so many: until the gap is over, which bytes
        hide, or an overhead; or what ranks that all send and put to use lose of the bandwidth, where that is more."""
        lost = way / self.share - way
        return max(self.overhead if self.gap is None else self.gap - way, lost)


class Wires(NamedTuple):
    """The wire between two ranks of a node, and that between ranks of different nodes."""

    node: Wire
    network: Wire

    @staticmethod
    def default(backend: str) -> Wires:
        """Where nothing was measured."""
        return GPUS if "nccl" in backend else PROCESSES

    @staticmethod
    def read(path: Path | str) -> Wires:
        """From a file of `lasp doctor --probe`. Raises ValueError, naming the file, where it is none."""
        try:
            links = json.loads(Path(path).read_text(encoding="utf-8"))["links"]
            levels = [links.get(one) or links[other] for one, other in (("node", "network"), ("network", "node"))]
            node, network = map(_wire, levels)
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is no file of `lasp doctor --probe`: {error!r}") from error
        return Wires(node, network)

    def between(self, source: int, target: int, node_size: int | None) -> Wire:
        """The wire between two ranks; node_size: how many consecutive ones share a node, None if all do."""
        return self.node if node_size is None or source // node_size == target // node_size else self.network


# NVLink of an H100 at 450 GB/s and InfiniBand NDR at 50 GB/s, their data sheets' figures per GPU and direction; and
# processes of one machine, and Ethernet at 10 Gbit/s. Latencies are round figures.
GPUS = Wires(Wire(30e-6, 450e9, 3e-6), Wire(40e-6, 50e9, 8e-6))
PROCESSES = Wires(Wire(300e-6, 1e9, 60e-6), Wire(400e-6, 1.25e9, 100e-6))


def _wire(told: dict[str, float]) -> Wire:
    latency, bandwidth = float(told["latency"]), float(told["bandwidth"])
    gap = told.get("gap")
    share, gap = float(told.get("share", 1.0)), None if gap is None else float(gap)
    wire = Wire(latency, bandwidth, float(told.get("hop", latency / 5)), share, gap)
    if wrong := [f"{name} = {value}" for name, value in wire._asdict().items() if value is not None and not value > 0]:
        raise ValueError(f"figures of a wire must be positive, got {', '.join(wrong)}")
    return wire
