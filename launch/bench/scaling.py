"""Four views of how training scales over ranks: of a small Linear-Llama3, by each way to share its sequence.

    grid        tokens/s over lengths of the sequence and numbers of ranks, and where memory does not do (LASP-2)
    share       a fixed number of tokens on each rank: tokens/s as a share of a data-parallel run of as many, which
                takes turns with it in the same processes (ZeCO)
    longest     the longest sequence that trains in so much memory of a rank
    documents   a sequence of packed documents, whose lengths have a long tail

Ranks are gloo processes of this machine, in fp32 with DDP and AdamW.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from lasp.launch.bench.cells import NOT_BEGUN, OK, OUT_OF_MEMORY, Records, columns, records_of, shown, without
from lasp.launch.bench.model import add_model, cell_of, here, show_machine
from lasp.launch.bench.options import at_least, network_rate, positive
from lasp.launch.bench.panels import draw
from lasp.launch.bench.table import markdown
from lasp.launch.bench.ways import ACTIVATIONS, DATA_PARALLEL, SOFTMAX_RING, WAYS
from lasp.layers import MIXERS

START, MOST = 512, 7
"""Of the search for the longest sequence: the tokens of a rank at which it begins, and how many cells it has."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which views, and how large they are."""
    parser.add_argument("--views", nargs="+", choices=VIEWS, default=list(VIEWS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--mixer", choices=MIXERS, default="lightning")
    parser.add_argument("--pattern", default="L")
    parser.add_argument("--ranks", type=at_least(1), nargs="+", default=[2, 4, 8], help="of the grid")
    parser.add_argument("--tokens", type=at_least(1), nargs="+", default=[4096, 16384], help="of the grid")
    parser.add_argument("--share-ranks", type=at_least(1), nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--share-tokens", type=at_least(1), default=1024, help="of each rank, whatever their number")
    parser.add_argument(
        "--emulate",
        type=network_rate,
        nargs="+",
        metavar="rate=RATE",
        help="networks of the shares as well",
    )
    parser.add_argument("--longest-ranks", type=at_least(1), nargs="+", default=[2, 4])
    parser.add_argument(
        "--longest-ways", nargs="+", choices=WAYS, default=["gather", SOFTMAX_RING, ACTIVATIONS], metavar="WAY"
    )
    parser.add_argument("--documents-ranks", type=at_least(1), default=4)
    parser.add_argument("--documents-tokens", type=at_least(1), default=8192, help="of all documents together")
    parser.add_argument("--minutes", type=positive, default=6.0, help="after which no cell is begun")
    add_model(parser)
    parser.set_defaults(repeat=2, memory=0.25, patience=30)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The records of each view."""
    sweep = Sweep(options)
    made = here()
    return {"machine": made, "views": {name: VIEWS[name].records(sweep) for name in options.views}}


def show(figures: dict[str, Any]) -> None:
    """A table of each view."""
    for name, records in figures["views"].items():
        if any(record["status"] == OK for record in records):
            VIEWS[name].show(records)
            print()
    model = next(iter(figures["views"].values()))[0]
    sizes = ", ".join(f"{value} {name}" for name, value in model["model"].items() if name != "kind")
    print(
        f"Linear-Llama3 of {model['mixer']}, pattern {model['pattern']}: {sizes}; {model['layout']}. OOM: more than",
        end="",
    )
    print(" the limit of a rank; -: there was no time left for it.", end="")
    show_machine(figures)


class Sweep:
    """Cells of the options' model, as long as there is time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._until = time.monotonic() + 60 * options.minutes

    def cell(self, tokens: int, ranks: int, *ways: str, **fields: Any) -> Records:
        """The records of one, which are empty where there is no time left."""
        cell = cell_of(
            self.options, tokens, ranks, ways, mixer=self.options.mixer, pattern=self.options.pattern, **fields
        )
        late = time.monotonic() > self._until
        return without(cell, NOT_BEGUN) if late else records_of(cell)


# Views --------------------------------------------------------------------------------------------------------------


def _grid(sweep: Sweep) -> Records:
    over = product(sweep.options.tokens, sweep.options.ranks, sweep.options.ways)
    return [record for tokens, ranks, way in over for record in sweep.cell(tokens, ranks, way)]


def _show_grid(records: Records) -> None:
    print("Tokens/s of a sequence, over its length and the ranks that share it:\n")
    heads = [(tokens, ranks) for tokens in columns(records, "tokens") for ranks in columns(records, "ranks")]
    found = {(r["way"], r["tokens"], r["ranks"]): r for r in records}
    rows = [[way, *(shown(found.get((way, *head))) for head in heads)] for way in columns(records, "way")]
    print(markdown(["way", *(f"{tokens} on {ranks}" for tokens, ranks in heads)], rows))


def _share(sweep: Sweep) -> Records:
    """Without a limit of memory: the processes hold all contestants at once."""
    each, records = sweep.options.share_tokens, []
    for rate, ranks in product([None, *(sweep.options.emulate or [])], sweep.options.share_ranks):
        if rate is None or ranks > 1:
            ways = [way for way in sweep.options.ways if way not in UNDIVIDED or sweep.options.heads % ranks == 0]
            records += sweep.cell(each * ranks, ranks, *ways, DATA_PARALLEL, rate=rate, memory=None)
    return records


def _show_share(records: Records) -> None:
    print(f"Tokens/s as a share of the data-parallel run beside it, {_per_rank(records)} tokens on each rank:\n")
    heads = [(network, ranks) for network in columns(records, "network") for ranks in columns(records, "ranks")]
    heads = [head for head in heads if any((r["network"], r["ranks"]) == head for r in records)]
    found = {(r["way"], r["network"], r["ranks"]): r for r in records}
    rows = []
    for way in columns(records, "way"):
        own = [(found.get((way, *head)), found.get((DATA_PARALLEL, *head))) for head in heads]
        rows.append([way, *(shown(one) if way == DATA_PARALLEL else share(one, two) for one, two in own)])
    rows = [["data parallel, tokens/s", *row[1:]] if row[0] == DATA_PARALLEL else row for row in rows]
    print(markdown(["way", *(f"{ranks}, {network}" for network, ranks in heads)], rows))


def share(one: dict[str, Any] | None, beside: dict[str, Any] | None) -> str:
    """A rate as a share of another."""
    if one is None or beside is None or one["status"] != OK:
        return shown(one)
    return f"{100 * one['rate'] / beside['rate']:.0f} %"


def _per_rank(records: Records) -> int:
    return int(records[0]["tokens"] // records[0]["ranks"])


def _longest(sweep: Sweep) -> Records:
    records: Records = []
    for ranks, way in product(sweep.options.longest_ranks, sweep.options.longest_ways):
        records += search(partial(_trains, sweep, ranks, way))
    return records


def _trains(sweep: Sweep, ranks: int, way: str, tokens: int) -> Records:
    """The record of two steps with so many tokens on each rank, which are not timed."""
    return sweep.cell(tokens * ranks, ranks, way, repeat=0)


def search(train: Callable[[int], Records]) -> Records:
    """Cells of more and more tokens of a rank: two short ones tell how memory grows, the others try what that says, and
    a tenth more or less until one trains and another does not."""
    tried = train(START) + train(2 * START)
    if any(record["status"] != OK for record in tried):
        return tried
    first, second = (record["peak_bytes"] for record in tried)
    limit = tried[0]["memory_limit"] * 2**30
    guess = max(START, int(START + (limit - first) / max(second - first, 1) * START) // 64 * 64)
    tried += train(guess)
    fits, step = tried[-1]["status"], 1.1 if tried[-1]["status"] == OK else 0.9
    while tried[-1]["status"] == fits in (OK, OUT_OF_MEMORY) and len(tried) < MOST:
        guess = int(guess * step) // 64 * 64
        tried += train(guess)
    return tried


def _show_longest(records: Records) -> None:
    print(f"The longest sequence that trained in {records[0]['memory_limit']} GiB of a rank, and one that did not:\n")
    ranks, rows = columns(records, "ranks"), []
    for way in columns(records, "way"):
        row: list[object] = [way]
        for number in ranks:
            own = [r for r in records if (r["way"], r["ranks"]) == (way, number)]
            row += [
                max((r["tokens"] for r in own if r["status"] == OK), default=None),
                min((r["tokens"] for r in own if r["status"] == OUT_OF_MEMORY), default=None),
            ]
        rows.append(row)
    print(markdown(["way", *(text for n in ranks for text in (f"{n} ranks: trained", "did not"))], rows))


def _documents(sweep: Sweep) -> Records:
    options = sweep.options
    bounds = tuple(document_bounds(options.documents_tokens))
    ways = [way for way in options.ways if way not in UNDIVIDED or options.heads % options.documents_ranks == 0]
    one = options.documents_tokens, options.documents_ranks
    return [
        *sweep.cell(*one, *ways, memory=None),
        *sweep.cell(*one, *ways, memory=None, documents=bounds),
    ]


def document_bounds(tokens: int) -> list[int]:
    """Where documents of long-tailed lengths begin and end: log-normal, a median of 200 tokens, one in forty of more
    than 2000."""
    rng, bounds = random.Random(0), [0]
    while bounds[-1] < tokens:
        bounds.append(min(tokens, bounds[-1] + max(1, int(rng.lognormvariate(5.3, 1.2)))))
    return bounds


def _show_documents(records: Records) -> None:
    packed = next(r["documents"] for r in records if r["documents"])
    print(f"{records[0]['tokens']} tokens on {records[0]['ranks']} ranks, as one text and as {packed} documents:\n")
    rows = []
    for way in columns(records, "way"):
        plain, cut = (next((r for r in records if r["way"] == way and bool(r["documents"]) == b), None) for b in (0, 1))
        rows.append([way, *(shown(r) for r in (plain, cut)), *(shown(r, "received", 1e-3) for r in (plain, cut))])
    print(markdown(["way", "tokens/s, one text", "documents", "received, KB, one text", "documents"], rows))


class View:
    """How a view is measured and shown."""

    def __init__(self, records: Callable[[Sweep], Records], show: Callable[[Records], None]) -> None:
        self.records, self.show = records, show


VIEWS = {
    "share": View(_share, _show_share),
    "documents": View(_documents, _show_documents),
    "longest": View(_longest, _show_longest),
    "grid": View(_grid, _show_grid),
}
UNDIVIDED = ("heads", ACTIVATIONS)
"""Ways that share out heads, which the ranks have to divide."""


def plot(figures: dict[str, Any], path: Path) -> None:
    """A panel for each view that has cells."""
    draw(figures["views"], path)
