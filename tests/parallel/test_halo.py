"""Halos: which tokens travel."""

from lasp.parallel.halo import halo_moves
from lasp.parallel.layout import pieces_of


def test_only_tokens_of_the_same_document_travel() -> None:
    """Of 10 | 9 | 9 | 9 tokens: a document ends at 10, one begins at 18, one token ahead of 19."""
    moves = halo_moves(pieces_of((10, 9, 9, 9), "contiguous"), (0, 10, 18, 37), 3)
    assert [tuple(move) for move in moves] == [(1, 2, 8, 1, 2), (2, 3, 6, 3, 3)]
    moves = halo_moves(pieces_of((2, 0, 1, 9), "contiguous"), None, 3)
    assert [tuple(move) for move in moves] == [(0, 2, 0, 2, 2), (0, 3, 0, 2, 3), (2, 3, 0, 1, 3)]
