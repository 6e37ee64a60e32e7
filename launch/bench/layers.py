"""Token mixers over the ranks of a group, a step of each: how much of it is the exchange that nothing hides.

    decay      GLA: a gate per channel, so that transfers are short
    delta      Gated DeltaNet: transfers are matrices
    softmax    causal attention

An exchange's exposed time is what the step takes beyond the same step with local copies in the exchange's place.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lasp
from lasp.kernels.segment import Segment
from lasp.kernels.softmax.mask import Mask
from lasp.launch.bench.timing import Contestant, interleave
from lasp.launch.bench.watch import Watch, alone, watched
from lasp.parallel import collectives, methods
from lasp.parallel.collectives import Ledger
from lasp.parallel.cost import Parcel, rounds_seconds, seconds
from lasp.parallel.cut import Cut
from lasp.parallel.exchange import sizes_of
from lasp.parallel.monoid import Affine
from lasp.parallel.scan import Heads, Scan
from lasp.parallel.schedule import Links, Sizes

SOFTMAX = ("ring", "gather", "ulysses")
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "decay": lasp.linear_attention,
    "delta": lasp.delta_rule,
    "softmax": lasp.softmax_attention,
}
SEEN = ("flight", "waited", "late", "after")
"""Of a `Watch`."""


@dataclass(frozen=True)
class Layer:
    """One kind of mixer, with a gate per channel (decay) or per token (delta), of so many heads and channels."""

    kind: str
    heads: int
    dim: int

    def inputs(self, tokens: int) -> dict[str, Tensor]:
        """Of one rank."""
        shape, rng = (1, tokens, self.heads, self.dim), torch.Generator().manual_seed(0)
        found = {name: torch.randn(shape, generator=rng) for name in "qkv"}
        found["k"] /= self.dim**0.5
        if self.kind == "decay":
            found["log_decay"] = -torch.rand(shape, generator=rng) / 8
        if self.kind == "delta":
            found |= {"beta": torch.rand(shape[:3], generator=rng), "log_decay": -torch.rand(shape[:3], generator=rng)}
        return {name: x.requires_grad_() for name, x in found.items()}

    def step(self, inputs: dict[str, Tensor], cut: Cut, how: str | Scan) -> None:
        """Forward and backward. how: the scan, or the method of attention."""
        exchange = {"method" if self.kind == "softmax" else "scan": how}
        output = OPERATIONS[self.kind](**inputs, cut=cut, **exchange)
        output.backward(torch.ones_like(output))

    def predicted(self, cut: Cut, how: str | Scan, ledger: Ledger) -> float:
        """Seconds that the exchanges would take with nothing beside them. ledger: of a step."""
        assert cut.group is not None, "a bench has ranks"
        wires, node_size = cut.group.wires, cut.group.node_size
        if isinstance(how, str):
            shapes = methods.Shapes(1, self.heads, self.heads, self.dim, self.dim, 4, 4, False)
            ways = methods.rounds(how, cut, Mask((0, cut.total)), shapes)
        elif isinstance(how, Heads):
            pairs = [(one, other) for one in range(cut.size) for other in range(cut.size) if one != other]
            deals = [record.bytes // (cut.size - 1) for record in ledger.records]
            ways = [tuple(Parcel(*pair, each) for pair in pairs) for each in deals], []
        else:
            there, back = (Links.of(cut.plan(), cut.size, reverse, node_size) for reverse in (False, True))
            sizes = self._sizes()
            fitted = how.fitted(there, sizes, wires)
            return sum(
                seconds(way, sizes, wires) for way in (fitted.schedule(there), fitted.schedule_back(back, there))
            )
        return sum(rounds_seconds(way, cut.size, wires, node_size) for way in ways)

    def _sizes(self) -> Sizes:
        state = torch.empty(1, self.heads, self.dim, self.dim)
        transfer = state if self.kind == "delta" else state[..., :1]
        return sizes_of(Segment(transfer, state), Affine())


def measure(
    layer: Layer, group: lasp.SequenceGroup, tokens: int, scans: Sequence[Scan], repeat: int
) -> list[dict[str, Any]]:
    """Each of the scans, or the methods of attention, with so many tokens to a rank, as this rank saw it."""
    cut, inputs = group.cut(tokens * group.size), layer.inputs(tokens)
    ways: list[str | Scan] = [*SOFTMAX] if layer.kind == "softmax" else [*scans]
    if layer.heads % group.size:
        ways = [how for how in ways if how != "ulysses" and not isinstance(how, Heads)]
    steps = [partial(layer.step, inputs, cut, how) for how in ways]
    watches: list[list[Watch]] = [[] for _ in ways]
    run: dict[tuple[int, str], Contestant] = {}
    for i, step in enumerate(steps):
        run |= {(i, "plain"): step, (i, "alone"): partial(_alone, step), (i, "seen"): partial(_seen, step, watches[i])}
    taken = interleave(run, repeat, together=lambda: collectives.barrier(group.process_group))
    found = []
    for i, how in enumerate(ways):
        with lasp.traffic() as ledger:
            steps[i]()
        exposed = taken[i, "plain"] - taken[i, "alone"]
        found.append(
            {"layer": layer.kind, "method": str(how), "seconds": taken[i, "plain"], "exposed": exposed}
            | _told(watches[i][1:], ledger)
            | {"predicted": layer.predicted(cut, how, ledger)}
        )
    return found


def _seen(step: Contestant, watches: list[Watch]) -> None:
    with watched() as watch:
        step()
    watches.append(watch)


def _alone(step: Contestant) -> None:
    with alone():
        step()


def _told(watches: Sequence[Watch], ledger: Ledger) -> dict[str, float]:
    """Medians of what was seen, and what one step received."""
    seen = {name: statistics.median(getattr(watch, name) for watch in watches) for name in SEEN}
    received = {name: sum(getattr(record, name) for record in ledger.records) for name in ("bytes", "steps")}
    return seen | {"received": received["bytes"], "steps": received["steps"]}
