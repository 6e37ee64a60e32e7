"""Chips, and the machines that are made of them: figures of data sheets, or of a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lasp.parallel.wires import GPUS, PROCESSES, Wire, Wires


@dataclass(frozen=True)
class Chip:
    """One device. flops: per second, of products of bf16 matrices, or what the dtype of the run has; bandwidth: bytes
    per second of its memory; memory: bytes.

    The shares of these that are reached are assumptions, unless a file says what was measured: matmul, of flops, by
    projections and MLPs; half, of that, by products of 16 bits where flops is of fp32; attention, of flops, by softmax
    attention; mixing, of flops, by a linear mixer; stream, of bandwidth, by what is bound to it: norms, optimizer,
    mixers. launch: seconds from one small kernel to the next, or on a CPU from the end of one operation to the start
    of another. reserve: bytes that the context and libraries take; fragments: of what changes in a step, what its
    allocator loses; both assumed too. mixers: of each kind that was measured, the share of flops in the place of
    mixing or attention, and how many times as long it takes backward, but for what else is counted of it (`tokenwise`
    of plan/estimate.py).
    fresh: seconds of a byte of memory that comes from the system anew. overlap: whether kernels are launched, and
    gradients travel, beside the computing, or by the core that computes. pace: seconds of a fixed piece of work
    (`launch/bench/pace.py`) when all this was measured, 0 where nobody looked.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    matmul: float = 0.6
    attention: float = 0.5
    mixing: float = 0.15
    stream: float = 0.7
    launch: float = 5e-6
    reserve: float = 1.5e9
    fragments: float = 0.05
    half: float = 1.0
    fresh: float = 0.0
    overlap: bool = True
    pace: float = 0.0
    mixers: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def relay(self, size: float) -> float:
        """Seconds to apply a map to a state of so many bytes: a product and a sum, reading two and writing one."""
        return 2 * self.launch + 3 * size / (self.stream * self.bandwidth)


@dataclass(frozen=True)
class Machine:
    """Nodes of equal chips. card: bytes per second and direction of a node's network, all cards together; None: every
    chip has a wire of its own. together: what a chip reaches while the others of its node are at work, and its mixers
    over ranks; None: the same."""

    chip: Chip
    wires: Wires
    gpus: int = 8
    card: float | None = None
    together: Chip | None = None

    def among(self, neighbours: int, sp: int) -> Chip:
        """One of so many that are at work on a node. sp: how many share a sequence, on whatever nodes."""
        if self.together is None:
            return self.chip
        chip = self.chip if neighbours == 1 else self.together
        return replace(chip, mixers=(self.chip if sp == 1 else self.together).mixers)

    @staticmethod
    def named(name: str) -> Machine:
        """One of `MACHINES`, or what a file says. Raises ValueError, naming what is wrong, where it is none."""
        if name in MACHINES:
            return MACHINES[name]
        if not Path(name).is_file():
            raise ValueError(f"--gpu must be {', '.join(MACHINES)} or a file, got {name!r}")
        try:
            told = json.loads(Path(name).read_text(encoding="utf-8"))
            return Machine.read(told)
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{name!r} describes no machine: {error}") from error

    @staticmethod
    def read(told: dict[str, Any]) -> Machine:
        """From the tables of a file: {"base": a name, "chip": {...}, "together": {...}, "node": wire, "network": wire,
        "gpus", "card"}."""
        known = {
            "base",
            "chip",
            "together",
            "node",
            "network",
            "gpus",
            "card",
            "benchmark",
            "command",
        }  # the last two: who wrote it
        if unknown := sorted(told.keys() - known):
            raise ValueError(f"unknown keys {', '.join(unknown)}")
        base = MACHINES[told.get("base", "cpu")]
        chip = _chip(base.chip, told.get("chip", {}))
        together = _chip(chip, told["together"]) if "together" in told else None
        wires = {kind: Wire(**{**getattr(base.wires, kind)._asdict(), **told.get(kind, {})}) for kind in Wires._fields}
        return Machine(chip, Wires(**wires), int(told.get("gpus", base.gpus)), told.get("card", base.card), together)


def _chip(base: Chip, told: dict[str, Any]) -> Chip:
    """One with these figures in the place of another's."""
    if wrong := sorted(told.keys() - {f.name for f in fields(Chip)}):
        raise ValueError(f"unknown figures of a chip: {', '.join(wrong)}")
    chip = Chip(**{**asdict(base), **told})
    mixers = {kind: (float(share), float(back)) for kind, (share, back) in chip.mixers.items()}
    numbers = {key: value for key, value in asdict(chip).items() if key not in ("name", "mixers")}
    numbers |= {f"mixers.{kind}.{n}": value for kind, both in mixers.items() for n, value in enumerate(both)}
    if wrong := [f"{k} = {v}" for k, v in numbers.items() if v < 0 or (v == 0 and k not in _MAY_BE_ZERO)]:
        raise ValueError(f"figures must be positive, got {', '.join(wrong)}")
    return replace(chip, mixers=mixers)


_MAY_BE_ZERO = ("reserve", "fragments", "launch", "fresh", "overlap", "pace")


# Data sheets of NVIDIA: dense bf16, SXM, NVLink per direction; a card of 400 Gbit/s per GPU (200 beside an A100).
# Latencies are those of `parallel/wires.py`. The CPU is a core of a server, in fp32, and gloo.
_A100 = Wires(Wire(30e-6, 300e9, 3e-6), Wire(40e-6, 25e9, 8e-6))
_B200 = Wires(Wire(30e-6, 900e9, 3e-6), Wire(40e-6, 50e9, 8e-6))
MACHINES = {
    "a100": Machine(Chip("A100", 312e12, 2.04e12, 80e9), _A100, card=200e9),
    "h100": Machine(Chip("H100", 989e12, 3.35e12, 80e9), GPUS, card=400e9),
    "h200": Machine(Chip("H200", 989e12, 4.8e12, 141e9), GPUS, card=400e9),
    "b200": Machine(Chip("B200", 2250e12, 8e12, 180e9), _B200, card=400e9),
    "cpu": Machine(
        Chip("CPU core", 1e11, 1e10, 8e9, 0.6, 0.4, 0.3, 0.5, 40e-6, 4e6, 0.01, fresh=1e-9, overlap=False),
        PROCESSES,
        gpus=2,
    ),
}
