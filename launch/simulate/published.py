"""What others measured, and what the simulator says of the same: LASP-2 on 64 A100, ZeCO on up to 256 H100.

LASP-2 (arXiv:2502.07563): Linear-Llama3-1B, tokens/s, and its gains over LASP-1 and Ring Attention. ZeCO
(arXiv:2507.01004): milliseconds of one exchange of 2 MiB, and a 1B model with 32K tokens per GPU, as the share of the
tokens/s that data parallelism reaches with the same GPUs. Neither tells its network, nor how many layers ZeCO's model
has: here 16, of 16 heads of 128 x 128.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from lasp.launch.bench.table import markdown
from lasp.launch.simulate.exchanges import Ways, links_of, scan_ways
from lasp.launch.simulate.machine import MACHINES
from lasp.launch.simulate.program import Exchange, Layer, Pass, Stage, Step
from lasp.launch.simulate.timeline import play
from lasp.parallel.scan import Gather, Pipeline, Ring, Scan
from lasp.parallel.schedule import Sizes
from lasp.parallel.traffic import Traffic
from lasp.parallel.wires import Wire, Wires

NODE, LAYERS = 8, 16
STATE = Sizes(16 * 128 * 128 * 4, 0, 128)


class Fit(NamedTuple):
    """A figure that no data sheet has: its value, its unit, and the cells that it was chosen to meet."""

    value: float
    unit: str
    what: str
    cells: tuple[str, ...]


FITS = {
    "lasp2 step": Fit(1.823, "s", "of a step, whatever its tokens (64 A100)", ("LASP-2, 128K, tokens/s",)),
    "lasp2 token": Fit(31.0e-6, "s", "of a token of a rank, all layers", ("LASP-2, 1024K, tokens/s",)),
    "lasp1 mixer": Fit(0.214e-6, "s", "of a token in a mixer, there and back", ("LASP-2 over LASP-1, 2048K, %",)),
    "ring bandwidth": Fit(810e9, "B/s", "at which keys are seen to pass", ("LASP-2 over Ring, 2048K, %",)),
    "gather launch": Fit(0.308e-3, "s", "of an all-gather, however small",
                         ("AllGather, 16, ms", "AllGather, 32, ms", "AllGather, 256, ms")),
    "gather bandwidth": Fit(88e9, "B/s", "between nodes, of an all-gather",
                            ("AllGather, 16, ms", "AllGather, 32, ms", "AllGather, 256, ms")),
    "scan launch": Fit(0.17e-3, "s", "of a pipelined scan", ("AllScan, 8, ms", "AllScan, 256, ms")),
    "scan latency": Fit(7e-6, "s", "of a hop of a pipelined scan", ("AllScan, 8, ms", "AllScan, 256, ms")),
    "scan blocks": Fit(16, "", "into which a state is cut", ("AllScan, 8, ms", "AllScan, 256, ms")),
    "split": Fit(1.5e-3, "s", "a mixer in two parts more than in one", ("ZeCO, 8, %", "LASP-2, 8, %")),
    "fold": Fit(0.045e-3, "s", "of LASP-2 to apply one rank's map", ("LASP-2, 256, %",)),
    "zeco lasp1": Fit(27.8e-3, "s", "of LASP-1's mixer, there and back", ("LASP-1, 64, %",)),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One published figure: its unit, by how much the simulated one may be off ("%" of it, or "points"), and that."""

    name: str
    published: float
    simulated: float
    within: float
    points: bool

    @property
    def fitted(self) -> bool:
        """Whether a figure of the simulator was chosen to meet it."""
        return any(self.name in fit.cells for fit in FITS.values())

    @property
    def off(self) -> float:
        """In points, or in percent of what was published."""
        difference = self.simulated - self.published
        return difference if self.points else 100 * difference / self.published

    @property
    def met(self) -> bool:
        return abs(self.off) <= self.within


def cells() -> list[Cell]:
    """Every one, in the order of the tables."""
    return [*_throughput(), *_gains(), *_collectives(), *_shares()]


def report() -> str:
    """Tables of the cells and of what was fitted, in Markdown."""
    every = cells()
    rows = []
    for cell in every:
        unit = "points" if cell.points else "%"
        rows.append(
            [cell.name, f"{cell.published:.4g}", f"{cell.simulated:.4g}", f"{cell.off:+.1f} {unit}",
             f"{cell.within} {unit}", "fitted on" if cell.fitted else "", "" if cell.met else "missed"]
        )  # fmt: skip
    table = markdown(["figure", "published", "simulated", "off", "may be off", "", ""], rows)
    fits = markdown(
        ["fitted", "value", "what", "on"],
        [[name, f"{fit.value:.3g} {fit.unit}", fit.what, "; ".join(fit.cells)] for name, fit in FITS.items()],
    )
    met = sum(cell.met for cell in every)
    free = [cell for cell in every if not cell.fitted]
    told = f"{met} of {len(every)} met; of {len(free)} that nothing was fitted on, {sum(cell.met for cell in free)}"
    return "\n\n".join([table, told, fits])


def _fit(name: str) -> float:
    return FITS[name].value


def _seconds(step: Step, ranks: int, wires: Wires) -> float:
    return play(step.program(), ranks, Traffic(wires, NODE)).seconds


# LASP-2 -------------------------------------------------------------------------------------------------------------

# A DGX A100: NVLink of 300 GB/s, and 800 Gbit/s of InfiniBand, which NCCL's rings share out.
_A100 = Wires(MACHINES["a100"].wires.node, Wire(40e-6, 100e9, 8e-6))


def _throughput() -> list[Cell]:
    published = {
        (64, 128): 67344, (64, 256): 130215, (64, 512): 245353, (64, 1024): 442221,
        (128, 256): 131550, (128, 512): 233442, (128, 1024): 416465, (128, 2048): 769030,
        (32, 128): 68545, (32, 256): 132605, (32, 512): 250586,
    }  # fmt: skip
    found = []
    for (ranks, kilo), rate in published.items():
        name = f"LASP-2, {kilo}K, tokens/s" if ranks == 64 else f"LASP-2, {kilo}K on {ranks}, tokens/s"
        found.append(Cell(name, rate, 1024 * kilo / lasp2_seconds(1024 * kilo, ranks), 15, points=False))
    return found


def _gains() -> list[Cell]:
    published = {("LASP-1", 512): 7.3, ("LASP-1", 2048): 15.2, ("Ring", 512): 17.8, ("Ring", 2048): 36.6}
    others: dict[str, Callable[[int], float]] = {"LASP-1": lasp1_seconds, "Ring": ring_seconds}
    found = []
    for (other, kilo), gain in published.items():
        more = others[other](1024 * kilo) / lasp2_seconds(1024 * kilo, 64) - 1
        found.append(Cell(f"LASP-2 over {other}, {kilo}K, %", gain, 100 * more, 5, points=True))
    return found


def lasp2_seconds(tokens: int, ranks: int) -> float:
    """A step: the gather travels beside the part of a mixer that needs no other rank, two fifths of it."""
    ways = scan_ways(Gather(), STATE, links_of(ranks, "contiguous", NODE), _A100, MACHINES["a100"].chip.relay)

    def mixing(seconds: float, exchange: Exchange | None) -> tuple[tuple[Stage, ...], float]:
        return (Stage(0.3 * seconds, exchange, 0.4 * seconds),), 0.3 * seconds

    return _seconds(_llama(tokens / ranks, ways, mixing), ranks, _A100)


def lasp1_seconds(tokens: int, ranks: int = 64) -> float:
    """A step: a rank waits for the state before it computes with it, and the next rank for all of that."""
    mixer = _fit("lasp1 mixer") * tokens / ranks
    step = _llama(tokens / ranks, Ways(None, None), lambda seconds, _: ((), 0.0))
    return _seconds(_chained(step, mixer, ranks, _A100), ranks, _A100)


def ring_seconds(tokens: int, ranks: int = 64) -> float:
    """A step: keys and values of all tokens pass by every rank, backward their gradients too; all ranks hop at once, as
    fast as from node to node."""
    local = tokens // ranks
    size = local * 2 * 16 * 128 * 2
    hops = [(ranks - 1) * (_A100.network.latency + times * size / _fit("ring bandwidth")) for times in (1, 2)]
    ways = Ways(*(Exchange("keys", collectives=[seconds]) for seconds in hops))
    return _seconds(_llama(local, ways, lambda seconds, keys: ((Stage(0.0, keys),), seconds)), ranks, _A100)


Mixing = Callable[[float, Exchange | None], tuple[tuple[Stage, ...], float]]


def _llama(tokens: float, ways: Ways, mixing: Mixing) -> Step:
    """Linear-Llama3-1B over so many tokens of a rank."""
    mixer = _fit("lasp1 mixer") * tokens
    outside = (_fit("lasp2 token") * tokens - LAYERS * mixer) / LAYERS
    (there, behind), (back, behind_back) = mixing(mixer / 3, ways.there), mixing(mixer * 2 / 3, ways.back)
    forward = Pass(outside / 6, there, behind, outside / 6)
    backward = Pass(outside / 3, back, behind_back, outside / 3)
    return Step([Layer("mixer", forward, backward)] * LAYERS, rest=_fit("lasp2 step"))


def _chained(step: Step, mixer: float, ranks: int, wires: Wires) -> Step:
    """The same with LASP-1's mixers: what arrives is computed with before anything is sent on, so that all of a mixer's
    work but that of the rank at the head is a part of the chain."""
    rings = scan_ways(Ring(), STATE, links_of(ranks, "contiguous", NODE), wires, lambda size: 0.0)
    passes = []
    for way, ring, head, seconds in zip(
        step.layers[0][1:3], rings, (0, ranks - 1), (mixer / 3, mixer * 2 / 3), strict=True
    ):
        ahead = tuple(seconds if rank == head else 0.0 for rank in range(ranks))
        chain = None if ring is None else ring._replace(relay=partial(_always, seconds))
        passes.append(way._replace(stages=(Stage(ahead, chain),)))
    forward, backward = passes
    return step._replace(layers=[Layer(step.layers[0].kind, forward, backward)] * len(step.layers))


def _always(seconds: float, size: float) -> float:
    return seconds


# ZeCO ---------------------------------------------------------------------------------------------------------------

_H100 = MACHINES["h100"].wires


def _collectives() -> list[Cell]:
    published = {
        "AllGather": (0.375, 0.658, 1.616, 2.543, 4.350, 8.514),
        "AllScan": (0.226, 0.297, 0.448, 0.739, 1.272, 2.165),
    }
    found = []
    sizes = Sizes(2 * STATE.state, 0, STATE.rows)
    for name, times in published.items():
        for ranks, time in zip((8, 16, 32, 64, 128, 256), times, strict=True):
            ways, wires, launch = _zeco(name, sizes, ranks)
            step = Step([Layer("", Pass(0.0, (Stage(launch, ways.there),)), Pass(0.0, ()))])
            found.append(Cell(f"{name}, {ranks}, ms", time, 1e3 * _seconds(step, ranks, wires), 20, points=False))
    return found


def _zeco(name: str, sizes: Sizes, ranks: int, fold: float = 0.0) -> tuple[Ways, Wires, float]:
    """An exchange of ZeCO's comparison, its wires, and what it takes to begin."""
    if name == "AllGather":
        scan: Scan = Gather()
        network, launch = Wire(40e-6, _fit("gather bandwidth"), 8e-6), _fit("gather launch")
        wires = Wires(_H100.node, network)
    else:
        scan, launch, latency = Pipeline(int(_fit("scan blocks"))), _fit("scan launch"), _fit("scan latency")
        wires = Wires(*(wire._replace(latency=latency, hop=latency) for wire in _H100))
    ways = scan_ways(scan, sizes, links_of(ranks, "contiguous", NODE), wires, lambda size: fold)
    return ways, wires, launch


def _shares() -> list[Cell]:
    """The published seconds of data parallelism are what a step takes without exchanges."""
    alone = {8: 49633, 64: 48230, 128: 47848, 256: 46588}
    rates = {
        "LASP-1": {8: 27014, 64: 12268},
        "LASP-2": {8: 42946, 64: 37485, 128: 33327, 256: 25402},
        "ZeCO": {8: 47369, 64: 44468, 128: 43278, 256: 40967},
    }
    found = []
    for name, own in rates.items():
        for ranks, rate in own.items():
            seconds = 32768 / alone[ranks]
            simulated = _lasp1_in_zeco(seconds, ranks) if name == "LASP-1" else _split(name, seconds, ranks)
            shares = 100 * rate / alone[ranks], 100 * seconds / simulated
            found.append(Cell(f"{name}, {ranks}, %", *shares, 6, points=True))
    return found


def _split(name: str, seconds: float, ranks: int) -> float:
    """A step whose mixers exchange: beside nothing, for the published steps do not hide it."""
    ways, wires, launch = _zeco("AllGather" if name == "LASP-2" else "AllScan", STATE, ranks,
                                _fit("fold") if name == "LASP-2" else 0.0)  # fmt: skip
    there, back = (Pass(0.0, (Stage(_fit("split") + launch, way),)) for way in ways)
    return _seconds(Step([Layer("mixer", there, back)] * LAYERS, rest=seconds), ranks, wires)


def _lasp1_in_zeco(seconds: float, ranks: int) -> float:
    alone = 2 * 6.39e-3  # published for 16K tokens of a layer's operator, there and back
    step = Step([Layer("mixer", Pass(0.0, ()), Pass(0.0, ()))] * LAYERS, rest=seconds - LAYERS * alone)
    return _seconds(_chained(step, _fit("zeco lasp1"), ranks, _H100), ranks, _H100)
