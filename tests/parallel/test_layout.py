"""Layouts and plans: which tokens and runs a rank holds."""

import pytest

from lasp.kernels.documents import document_bounds
from lasp.kernels.softmax.mask import Mask, tiles
from lasp.parallel.keys import span
from lasp.parallel.layout import even_pieces, make_plan


def test_plan_of_a_document_over_three_ranks() -> None:
    """A document that spans ranks is one run on each, and only its ends reset and finish."""
    bounds = document_bounds((0, 3, 30, 37), 37)
    plans = [make_plan((10, 9, 9, 9), rank, "contiguous", bounds) for rank in range(4)]
    runs = [[(r.offset, r.length, r.document, r.reset, r.last) for r in plan.runs] for plan in plans]
    assert runs == [
        [(0, 3, 0, True, True), (3, 7, 1, True, False)],
        [(0, 9, 1, False, False)],
        [(0, 9, 1, False, False)],
        [(0, 2, 1, False, True), (2, 7, 2, True, True)],
    ]
    assert [link.reset for link in plans[0].links] == [True, False, False, True]


def pairs_of(length: int, layout: str) -> list[int]:
    """How many query-key pairs each of four ranks computes under a causal mask."""
    mask, pieces = Mask((0, length)), even_pieces(length, 4, layout)
    found = [0] * 4
    for own in pieces:
        for other in pieces:
            for tile in tiles(mask, span(own), span(other)):
                assert tile.kind != "masked"
                rows, keys = tile.rows.length, tile.keys.length
                found[own.rank] += rows * keys if tile.kind == "full" else rows * (rows + 1) // 2
    assert sum(found) == length * (length + 1) // 2
    return found


@pytest.mark.parametrize("length", [1024, 1031])
def test_zigzag_balances_causal_work(length: int) -> None:
    zigzag, contiguous = pairs_of(length, "zigzag"), pairs_of(length, "contiguous")
    assert max(zigzag) < 1.01 * min(zigzag)
    assert max(contiguous) > 6 * min(contiguous)
