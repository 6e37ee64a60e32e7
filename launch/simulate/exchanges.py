"""Exchanges of a step, of what the project itself sends: schedules of scans, rotations of keys, sums of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil
from typing import NamedTuple

from lasp.launch.simulate.program import Exchange, Stage
from lasp.parallel.cost import Parcel, gathers_of, letters_of, rounds_seconds
from lasp.parallel.layout import Layout, Piece, even_pieces, make_plan
from lasp.parallel.rotation import Rotation, Route, make_rotation
from lasp.parallel.scan import Scan
from lasp.parallel.schedule import EVERYONE, Links, Schedule, Sizes
from lasp.parallel.traffic import Letter
from lasp.parallel.wires import Wires

Relay = Callable[[float], float]


class Ways(NamedTuple):
    """An exchange on the way there and on the way back; None where nothing passes."""

    there: Exchange | None
    back: Exchange | None


def links_of(ranks: int, layout: Layout, node_size: int | None) -> tuple[Links, Links]:
    """Those of one long sequence, there and back."""
    plan = make_plan((2,) * ranks, 0, layout, None)
    there, back = (Links.of(plan, ranks, reverse, node_size) for reverse in (False, True))
    return there, back


def scan_ways(scan: Scan, sizes: Sizes, links: tuple[Links, Links], wires: Wires, relay: Relay) -> Ways:
    """The schedules of a scan. relay: seconds that a map of so many bytes takes to be applied."""
    there, back = links
    if there.size == 1:
        return Ways(None, None)
    scan = scan.fitted(there, sizes, wires)
    schedules = scan.schedule(there), scan.schedule_back(back, there)
    return Ways(*(_scan(str(scan), schedule, sizes, wires, relay) for schedule in schedules))


def _scan(name: str, schedule: Schedule, sizes: Sizes, wires: Wires, relay: Relay) -> Exchange:
    links = schedule.links

    def fold(rank: int) -> float:
        """Of what a collective has brought, the maps ahead of a rank's links are applied one after another."""
        asking = [link for link in links.of_rank(rank) if links.asks(link)]
        return relay(sizes.state) * sum(link - links.starts[link] for link in asking)

    gathers = gathers_of(schedule, sizes, wires)
    return Exchange(name, letters_of(schedule, sizes), gathers, relay, fold if gathers else lambda rank: 0.0)


def sum_of_gradients(size: float, ranks: int, wires: Wires, node_size: int | None) -> Exchange | None:
    """An all-reduce over so many ranks: a sum that leaves a part to each, and a gather of the parts."""
    if ranks == 1 or not size:
        return None
    part = (Parcel(0, EVERYONE, ceil(size / ranks)),)
    return Exchange("gradients", collectives=[2 * rounds_seconds([part], ranks, wires, node_size)])


# Keys on a ring -----------------------------------------------------------------------------------------------------


def causal_rotation(tokens: int, ranks: int, layout: Layout) -> Rotation:
    """How far the keys of one long sequence travel, where queries see what is before them."""
    pieces = even_pieces(tokens, ranks, layout)
    return make_rotation(pieces, ranks, lambda own, other: own.start >= other.start)


class KeyRing(NamedTuple):
    """Keys and values that pass from rank to rank. size: bytes of a token's; per_pair: seconds of a query and a key."""

    rotation: Rotation
    pieces: tuple[Piece, ...]
    size: float
    per_pair: float

    def forward(self) -> tuple[tuple[Stage, ...], tuple[float, ...]]:
        """The hops, and what is left to compute behind the last."""
        hops = range(self.rotation.hops)
        stages = (Stage(0.0, self._hop(list(self._keys(hop))), self._work(hop, 1.0)) for hop in hops)
        return tuple(stages), self._work(self.rotation.hops, 1.0)

    def backward(self) -> tuple[Stage, ...]:
        """The same hops again, with gradients of twice the bytes behind the keys, and home in the end."""
        stages = []
        for hop in range(self.rotation.hops + 2):
            letters = [*self._keys(hop), *self._gradients(hop - 1)]
            stages.append(Stage(0.0, self._hop(letters), self._work(hop, 2.5)))
        return tuple(stages)

    def _hop(self, letters: list[Letter]) -> Exchange | None:
        return Exchange("keys", letters) if letters else None

    def _keys(self, hop: int) -> Iterator[Letter]:
        for route in (route for own in self.rotation.routes for route in own if route.last > hop):
            yield self._letter(route, hop, hop + 1, self.size)

    def _gradients(self, hop: int) -> Iterator[Letter]:
        for route in (route for own in self.rotation.routes for route in own if 1 <= route.first <= hop <= route.last):
            yield self._letter(route, hop, 0 if hop == route.last else hop + 1, 2 * self.size)

    def _letter(self, route: Route, hop: int, to: int, size: float) -> Letter:
        ranks = self.rotation.ranks
        tokens = route.piece.stop - route.piece.start
        return Letter(0, route.holder(hop, ranks), route.holder(to, ranks), tokens * size)

    def _work(self, hop: int, times: float) -> tuple[float, ...]:
        """Seconds of each rank with the keys that it holds after a hop."""
        pairs = [0.0] * self.rotation.ranks
        for route in (route for own in self.rotation.routes for route in own if hop <= route.last):
            holder, there = route.holder(hop, self.rotation.ranks), route.piece
            for own in (piece for piece in self.pieces if piece.rank == holder):
                seen = 0.5 if own.start == there.start else float(own.start > there.start)
                pairs[holder] += seen * (own.stop - own.start) * (there.stop - there.start)
        return tuple(times * self.per_pair * number for number in pairs)
