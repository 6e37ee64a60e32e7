"""Which keys a query sees, in integers: a block of scores is cut into tiles before any tensor is touched.

Every query sees one interval of keys: its document, up to itself where attention is causal, and from window - 1 tokens
before it where there is a window. Both ends of the interval only move forward from query to query. So a block of
queries and keys falls into

    full     every query sees every key: no mask
    causal   the square on the diagonal: what every flash kernel knows
    masked   the rest: explicit masks of at most ROWS rows and about twice as many keys
    nothing  neither listed nor computed, nor, over ranks, waited for
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

ROWS = 512  # of an explicitly masked tile at most
SHORT = 128  # documents that show fewer keys share a masked tile with their neighbours


class Span(NamedTuple):
    """Consecutive tokens of the whole sequence."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def overlap(self, other: Span) -> Span:
        """The tokens in both; stop <= start where there are none."""
        return Span(max(self.start, other.start), min(self.stop, other.stop))


class Tile(NamedTuple):
    """A rectangle of scores. Every key in it is seen by some query of it."""

    rows: Span
    keys: Span
    kind: str  # "full" | "causal" | "masked"


@dataclass(frozen=True)
class Mask:
    """Who sees whom in one call. bounds: of the documents, from 0 to the whole sequence's length."""

    bounds: tuple[int, ...]
    causal: bool = True
    window: int | None = None  # tokens that a query sees, itself included; causal only

    def document(self, token: int) -> Span:
        """The document that holds a token."""
        i = bisect_right(self.bounds, token)
        return Span(self.bounds[i - 1], self.bounds[i])

    def visible(self, query: int) -> Span:
        """The keys that a query sees."""
        start, stop = self.document(query)
        if self.causal:
            stop = query + 1
        if self.window is not None:
            start = max(start, stop - self.window)
        return Span(start, stop)

    def seen(self, rows: Span) -> Span:
        """The keys that any of these queries sees: their intervals leave no gap."""
        return Span(self.visible(rows.start).start, self.visible(rows.stop - 1).stop)

    def shows(self, rows: Span, keys: Span) -> bool:
        """Whether any of these queries sees any of these keys."""
        return rows.length > 0 and self.seen(rows).overlap(keys).length > 0


@lru_cache(maxsize=4096)
def tiles(mask: Mask, rows: Span, keys: Span, keys_hidden: bool = False) -> tuple[Tile, ...]:
    """What must be computed of a block of queries and keys. keys_hidden: some keys are masked one by one, which no
    kernel combines with its own causal mask; "full" then means full but for those keys."""
    if not mask.shows(rows, keys):
        return ()
    found = []
    for block in _blocks(mask, rows):
        for part in _split(mask, block, keys, keys_hidden):
            found += _tiles_of(mask, part, keys, keys_hidden)
    return tuple(found)


def _blocks(mask: Mask, rows: Span) -> list[Span]:
    """Rows of one document each, or of several short ones."""
    blocks: list[Span] = []
    start = rows.start
    while start < rows.stop:
        run = Span(start, min(mask.document(start).stop, rows.stop))
        joined = Span(blocks[-1].start, run.stop) if blocks else run
        sizes = [mask.seen(span).length for span in (*blocks[-1:], run)]
        if blocks and min(sizes) < SHORT and mask.seen(joined).length <= ROWS:
            blocks[-1] = joined
        else:
            blocks.append(run)
        start = run.stop
    return blocks


def _split(mask: Mask, block: Span, keys: Span, keys_hidden: bool) -> list[Span]:
    """The block in parts of at most ROWS where some of its tiles would need an explicit mask."""
    border = Span(mask.visible(block.start).start, mask.visible(block.stop - 1).start)  # left end of the window
    if border.overlap(keys).length <= 0 and not (keys_hidden and mask.causal and block.overlap(keys).length > 0):
        return [block]
    return [Span(start, min(start + ROWS, block.stop)) for start in range(block.start, block.stop, ROWS)]


def _tiles_of(mask: Mask, rows: Span, keys: Span, keys_hidden: bool) -> list[Tile]:
    """The tiles of rows that lie in one document, or in several short ones."""
    seen, last = mask.seen(rows), mask.visible(rows.stop - 1)
    if mask.document(rows.start) != mask.document(rows.stop - 1):
        parts = [(seen, "masked")]
    elif not mask.causal:
        parts = [(seen, "full")]
    elif last.start > rows.start:  # the window is shorter than the rows
        parts = [(seen, "masked")]
    else:
        border, shared = Span(seen.start, last.start), Span(last.start, rows.start)
        parts = [(border, "masked"), (shared, "full"), (rows, "masked" if keys_hidden else "causal")]
    found = []
    for part, kind in parts:
        cut = part.overlap(keys)
        if cut.length > 0:
            # A diagonal that the keys cut short is no square any more.
            found.append(Tile(rows, cut, "masked" if kind == "causal" and cut != part else kind))
    return found
