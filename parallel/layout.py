"""Layouts: which tokens a rank holds, and the Plan of a call. Integers only, no torch.distributed.

    contiguous   rank r holds piece r of W:                    | 0 | 1 | 2 | 3 |
    zigzag       rank r holds pieces r and 2W-1-r of 2W:       |0|1|2|3|3|2|1|0|

Zigzag balances causal softmax attention; a linear layer runs on either.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from lasp.parallel.remembered import remembered

Layout = Literal["contiguous", "zigzag"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


class Piece(NamedTuple):
    """Consecutive tokens of the whole sequence on one rank. `order` counts the pieces of all ranks from the start."""

    order: int
    rank: int
    start: int
    stop: int
    offset: int  # of its first token in the rank's local tensor


class Run(NamedTuple):
    """Consecutive local tokens of one document, within one piece."""

    offset: int
    length: int
    chain: int
    order: int  # of its piece in the chain
    document: int
    reset: bool  # the document begins here: nothing comes in but its initial state
    last: bool  # the document ends here


class Link(NamedTuple):
    """A piece as a link of the chain along which states travel."""

    chain: int
    order: int
    rank: int
    place: int  # among the links of its rank
    length: int
    reset: bool  # a document begins in it: nothing passes through
    opens: bool = False  # one begins with its first token: nothing enters
    closes: bool = False  # one ends with its last token: no gradient enters its end


@dataclass(frozen=True)
class Plan:
    """What one rank needs to know of a call: its runs, and the links of all ranks in order."""

    rank: int
    runs: tuple[Run, ...]
    links: tuple[Link, ...]
    documents: int

    @property
    def own_links(self) -> tuple[Link, ...]:
        """This rank's links, by place."""
        return tuple(link for link in self.links if link.rank == self.rank)

    def runs_of(self, link: Link) -> list[int]:
        """The indices of the runs in one of this rank's links."""
        return [i for i, run in enumerate(self.runs) if (run.chain, run.order) == (link.chain, link.order)]

    def times(self, steps: int) -> Plan:
        """The plan of a sequence in which every token takes `steps` steps (DeltaProduct)."""
        runs = (run._replace(offset=run.offset * steps, length=run.length * steps) for run in self.runs)
        links = (link._replace(length=link.length * steps) for link in self.links)
        return Plan(self.rank, tuple(runs), tuple(links), self.documents)

    @property
    def local_runs(self) -> tuple[tuple[int, int], ...]:
        """(offset, length) of every run: all that a kernel is told."""
        return tuple((run.offset, run.length) for run in self.runs)


def even_bounds(length: int, pieces: int) -> tuple[int, ...]:
    """The bounds of `pieces` pieces of length // pieces tokens, the first length % pieces of them one longer."""
    size, longer = length // pieces, length % pieces
    return tuple(i * size + min(i, longer) for i in range(pieces + 1))


def even_pieces(length: int, ranks: int, layout: str) -> tuple[Piece, ...]:
    """The pieces of a whole sequence in order, cut as evenly as the layout allows."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if length < ranks:
        raise ValueError(f"a sequence of {length} tokens cannot be cut over {ranks} ranks: fewer tokens than ranks")
    owners = list(range(ranks)) if layout == "contiguous" else [*range(ranks), *reversed(range(ranks))]
    bounds, filled, pieces = even_bounds(length, len(owners)), [0] * ranks, []
    for order, rank in enumerate(owners):
        pieces.append(Piece(order, rank, bounds[order], bounds[order + 1], filled[rank]))
        filled[rank] += bounds[order + 1] - bounds[order]
    return tuple(pieces)


def even_slices(length: int, rank: int, ranks: int, layout: str) -> list[slice]:
    """The token ranges of one rank, in local order."""
    return [slice(piece.start, piece.stop) for piece in even_pieces(length, ranks, layout) if piece.rank == rank]


@remembered
def pieces_of(lengths: tuple[int, ...], layout: str) -> tuple[Piece, ...]:
    """The pieces in order, given every rank's number of tokens. Contiguous takes any cut, zigzag only the even one."""
    pieces = even_pieces(sum(lengths), len(lengths), layout)
    if layout == "contiguous" or len(lengths) == 1:  # on one rank the pieces of a zigzag follow one another
        starts = [sum(lengths[:rank]) for rank in range(len(lengths) + 1)]
        return tuple(Piece(r, r, starts[r], starts[r + 1], 0) for r in range(len(lengths)))
    expected = tuple(sum(p.stop - p.start for p in pieces if p.rank == rank) for rank in range(len(lengths)))
    if lengths != expected:
        raise ValueError(
            f"{sum(lengths)} tokens in the {layout} layout over {len(lengths)} ranks are cut as {list(expected)}, "
            f"but the ranks hold {list(lengths)}"
        )
    return pieces


def joined_pieces(pieces: tuple[Piece, ...], neighbours: int) -> tuple[Piece, ...]:
    """The pieces after every `neighbours` ranks have put their tokens together, in order of position.

    The ranks then are those of a smaller ring; pieces that touch become one.
    """
    joined: list[Piece] = []
    filled: dict[int, int] = defaultdict(int)
    for piece in pieces:
        rank, length = piece.rank // neighbours, piece.stop - piece.start
        if joined and joined[-1].rank == rank:
            joined[-1] = joined[-1]._replace(stop=piece.stop)
        else:
            joined.append(Piece(len(joined), rank, piece.start, piece.stop, filled[rank]))
        filled[rank] += length
    return tuple(joined)


@remembered
def make_plan(
    lengths: tuple[int, ...], rank: int, layout: str = "contiguous", bounds: tuple[int, ...] | None = None
) -> Plan:
    """The plan of one rank. lengths: every rank's number of tokens; bounds: cu_seqlens, None for one document."""
    pieces = pieces_of(lengths, layout) if sum(lengths) else (Piece(0, 0, 0, 0, 0),)
    bounds = (0, sum(lengths)) if bounds is None else bounds
    last_full = max([0, *(p.order for p in pieces if p.stop > p.start)])
    links, runs, links_per_rank = [], [], [0] * len(lengths)
    for piece in pieces:
        found = _runs(piece, bounds, piece.order == last_full)
        links.append(
            Link(
                chain=0,
                order=piece.order,
                rank=piece.rank,
                place=links_per_rank[piece.rank],
                length=piece.stop - piece.start,
                reset=any(run.reset for run in found),
                opens=found[0].reset,
                closes=found[-1].last,
            )
        )
        links_per_rank[piece.rank] += 1
        if piece.rank == rank:
            runs += found
    return Plan(rank, tuple(runs), tuple(links), len(bounds) - 1)


def _runs(piece: Piece, bounds: tuple[int, ...], closes: bool) -> list[Run]:
    """The runs of a piece. An empty document belongs to the piece that holds its position, one at the very end of the
    sequence to the piece that `closes` it. An empty piece passes everything through: one empty run."""
    runs = []
    nearest, behind = 0, 1
    if len(bounds) > 2:  # torch.compile cannot trace a bisection
        nearest = max(bisect_left(bounds, piece.start) - 1, 0)
        behind = min(bisect_right(bounds, piece.stop), len(bounds) - 1)
    for document in range(nearest, behind):
        start, stop = bounds[document], bounds[document + 1]
        first, end = max(start, piece.start), min(stop, piece.stop)
        empty_here = start == stop and (piece.start <= start < piece.stop or (closes and start == piece.stop))
        if first < end or empty_here:
            reset, last = start >= piece.start, stop <= piece.stop
            runs.append(Run(piece.offset + first - piece.start, end - first, 0, piece.order, document, reset, last))
    return runs or [Run(piece.offset, 0, 0, piece.order, 0, reset=False, last=False)]
