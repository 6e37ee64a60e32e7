"""Rotations: every piece's keys come by all ranks that need them, and their gradients come home."""

import pytest

from lasp.parallel.layout import LAYOUTS, Piece, even_pieces
from lasp.parallel.rotation import make_rotation

NEEDS = {
    "causal": lambda own, piece: own.order > piece.order,
    "all": lambda own, piece: True,
    "window": lambda own, piece: own.order - piece.order in (0, 1),
    "none": lambda own, piece: own.order == piece.order,
}


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_keys_meet_their_queries_and_gradients_come_home(ranks: int, layout: str, needs: str) -> None:
    pieces = even_pieces(2 * ranks + 1, ranks, layout)
    rotation = make_rotation(pieces, ranks, NEEDS[needs])
    met: set[tuple[int, Piece]] = set()
    for hop in range(1, rotation.hops + 1):
        for rank in range(ranks):
            for route in rotation.held(rank, hop):
                assert route.holder(hop, ranks) == rank
                if hop >= route.first:
                    met.add((rank, route.piece))
    wanted = {(own.rank, p) for own in pieces for p in pieces if own.rank != p.rank and NEEDS[needs](own, p)}
    assert wanted <= met
    home = [route for rank in range(ranks) for hop in range(rotation.hops + 1)
            for route in rotation.returning(rank, hop) if route.piece.rank == rank]  # fmt: skip
    assert sorted(route.piece for route in home) == sorted({piece for _, piece in wanted})


def test_late_pieces_of_a_causal_zigzag_stop_at_rank_0() -> None:
    """A quarter of the hops less than around the whole ring."""
    rotation = make_rotation(even_pieces(8 * 10, 4, "zigzag"), 4, NEEDS["causal"])
    routes = sorted(route for own in rotation.routes for route in own)
    assert [(route.piece.order, route.last) for route in routes] == list(enumerate((3, 3, 3, 3, 3, 2, 1, 0)))
    assert {route.step for route in routes if route.last} == {-1}
