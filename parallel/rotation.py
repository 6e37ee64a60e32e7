"""Rotation: how far around a ring each piece's keys travel. Integers only, no torch.distributed.

Keys leave their rank and pass one neighbour per hop, up to the last rank that has a query for them; gradients set out
at the first such rank, pass along with the keys, and go home from the last. A piece that no other rank needs stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from lasp.parallel.layout import Piece


class Route(NamedTuple):
    """The hops after which a piece first and last meets a rank that needs its keys; 0 where no other rank does."""

    piece: Piece
    first: int
    last: int


@dataclass(frozen=True)
class Rotation:
    """The routes of all pieces. step: 1 when keys pass to the next rank, -1 to the one before."""

    step: int
    routes: tuple[tuple[Route, ...], ...]  # by the rank they begin at

    @property
    def ranks(self) -> int:
        return len(self.routes)

    @property
    def hops(self) -> int:
        """Hops that wait for one another."""
        return max((route.last for own in self.routes for route in own), default=0)

    @property
    def cost(self) -> int:
        """Tokens times hops."""
        return sum(route.last * (route.piece.stop - route.piece.start) for own in self.routes for route in own)

    def holder(self, route: Route, hop: int) -> int:
        """Who holds a piece's keys after `hop` hops."""
        return (route.piece.rank + self.step * hop) % self.ranks

    def held(self, rank: int, hop: int) -> tuple[Route, ...]:
        """The routes whose keys a rank holds after `hop` hops."""
        return tuple(route for route in self.routes[(rank - self.step * hop) % self.ranks] if hop <= route.last)

    def returning(self, rank: int, hop: int) -> tuple[Route, ...]:
        """The routes whose gradients a rank receives after the computation of `hop`: those that come from its
        neighbour to be added to, and its own that come home."""
        if hop == 0:
            return ()
        passing = [route for route in self.held(rank, hop + 1) if route.first <= hop]
        return (*passing, *(route for route in self.routes[rank] if route.last == hop))


def make_rotation(pieces: tuple[Piece, ...], ranks: int, needs: Callable[[Piece, Piece], bool]) -> Rotation:
    """The cheaper of the two directions. needs: whether the queries of one piece see any key of another.

    On the zigzag layout a causal mask empties half of what a rank meets, and against the order of ranks those halves
    come last, so that they never travel: a quarter of the bytes less. On the contiguous layout it is the other way.
    """
    users = [{own.rank for own in pieces if own.rank != piece.rank and needs(own, piece)} for piece in pieces]

    def turned(step: int) -> Rotation:
        routes: list[list[Route]] = [[] for _ in range(ranks)]
        for piece, needing in zip(pieces, users, strict=True):
            hops = [step * (rank - piece.rank) % ranks for rank in needing]
            if piece.start < piece.stop:
                routes[piece.rank].append(Route(piece, min(hops, default=0), max(hops, default=0)))
        return Rotation(step, tuple(map(tuple, routes)))

    return min(turned(1), turned(-1), key=lambda rotation: rotation.cost)
