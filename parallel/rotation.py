"""Rotation: how far around a ring each piece's keys travel. Integers only, no torch.distributed.

Keys leave their rank and pass one neighbour per hop, one way or the other, up to the last rank that has a query for
them. Gradients set out at the first such rank, follow the keys, and go home from the last. A piece that no other rank
needs stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from lasp.parallel.layout import Piece


class Route(NamedTuple):
    """The way of a piece's keys: to the next rank (step 1) or to the one before (-1), hop by hop. `first` and `last`
    are the hops after which a rank needs them; 0 where no other rank does."""

    piece: Piece
    step: int
    first: int
    last: int

    def holder(self, hop: int, ranks: int) -> int:
        """Who holds the keys after `hop` hops."""
        return (self.piece.rank + self.step * hop) % ranks


@dataclass(frozen=True)
class Rotation:
    """The routes of all pieces, by the rank they begin at."""

    routes: tuple[tuple[Route, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.routes)

    @property
    def hops(self) -> int:
        """Hops that wait for one another."""
        return max((route.last for own in self.routes for route in own), default=0)

    def held(self, rank: int, hop: int) -> tuple[Route, ...]:
        """The routes whose keys a rank holds after `hop` hops."""
        if hop == 0:
            return self.routes[rank]
        return tuple(
            route
            for step in (1, -1)
            for route in self.routes[(rank - step * hop) % self.ranks]
            if route.step == step and hop <= route.last
        )

    def returning(self, rank: int, hop: int) -> tuple[Route, ...]:
        """The routes whose gradients a rank receives after the computation of `hop`: those that come from a neighbour
        to be added to, and its own that come home."""
        if hop == 0:
            return ()
        passing = [route for route in self.held(rank, hop + 1) if route.first <= hop]
        return (*passing, *(route for route in self.routes[rank] if route.last == hop))


def make_rotation(pieces: tuple[Piece, ...], ranks: int, needs: Callable[[Piece, Piece], bool]) -> Rotation:
    """Every piece takes the shorter way. needs: whether the queries of one piece see any key of another.

    Where both are as long, it goes the way that is shorter for all pieces together: so the causal zigzag ring goes
    against the order of ranks, where late pieces stop at rank 0 (a quarter of the bytes less) and where every rank has
    as much to compute after every hop.
    """
    users = [{own.rank for own in pieces if own.rank != piece.rank and needs(own, piece)} for piece in pieces]

    def routes(step: int) -> list[Route]:
        ways = [[step * (rank - piece.rank) % ranks for rank in met] for piece, met in zip(pieces, users, strict=True)]
        return [
            Route(piece, step, min(hops, default=0), max(hops, default=0))
            for piece, hops in zip(pieces, ways, strict=True)
        ]

    shorter, longer = sorted((routes(1), routes(-1)), key=lambda ways: sum(_tokens(way) * way.last for way in ways))
    best = [min(pair, key=lambda way: way.last) for pair in zip(shorter, longer, strict=True)]
    by_rank = [[way for way in best if way.piece.rank == rank and _tokens(way)] for rank in range(ranks)]
    return Rotation(tuple(map(tuple, by_rank)))


def _tokens(route: Route) -> int:
    return route.piece.stop - route.piece.start
