"""A small Linear-Llama3 in training, cell by cell: tokens/s, memory, bytes and waiting by length, ranks, way and mixer.

Every cell is a process group of its own on the ranks of this machine, in fp32 with DDP and AdamW; one that wants more
memory than `--memory` allows, or more time, is told so in its place.
"""

from __future__ import annotations

import argparse
import os
from datetime import date
from itertools import product
from typing import Any

from lasp.launch.bench.cells import NOT_BEGUN, OK, OUT_OF_MEMORY, TOO_SLOW, Cell, records_of, shown
from lasp.launch.bench.options import at_least, network_rate, positive
from lasp.launch.bench.table import markdown
from lasp.launch.bench.timing import machine
from lasp.launch.bench.ways import DATA_PARALLEL, WAYS
from lasp.launch.ranks import cores
from lasp.layers import MIXERS
from lasp.parallel.layout import LAYOUTS

SIZES = {
    "vocab_size": "vocabulary",
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
}


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model, what a rank may hold, and how long a cell may take."""
    parser.add_argument("--hidden", type=at_least(1), default=128)
    parser.add_argument("--layers", type=at_least(1), default=2)
    parser.add_argument("--heads", type=at_least(1), default=8)
    parser.add_argument("--vocabulary", type=at_least(2), default=256)
    parser.add_argument("--layout", choices=LAYOUTS, default="contiguous")
    parser.add_argument("--memory", type=positive, metavar="GIB", help="that a rank may hold beyond its libraries")
    parser.add_argument("--patience", type=at_least(1), default=60, metavar="SECONDS", help="of a cell and way")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The cells."""
    parser.add_argument("--tokens", type=at_least(1), nargs="+", default=[2048, 8192], help="of a sequence")
    parser.add_argument("--ranks", type=at_least(1), nargs="+", default=[1, 2])
    parser.add_argument("--ways", nargs="+", choices=(*WAYS, DATA_PARALLEL), default=["gather", "ring"])
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=["lightning", "gated_deltanet"])
    parser.add_argument("--patterns", nargs="+", default=["L"], help="such as L, or LLLN of a hybrid")
    parser.add_argument("--emulate", type=network_rate, nargs="+", metavar="rate=RATE", help="such as rate=1gbit")
    add_model(parser)


def cell_of(options: argparse.Namespace, tokens: int, ranks: int, ways: tuple[str, ...], **fields: Any) -> Cell:
    """A cell of the options' model."""
    sizes = {name: getattr(options, option) for name, option in SIZES.items()}
    own = {"layout": options.layout, "memory": options.memory, "patience": float(options.patience)}
    own |= {"repeat": options.repeat, "sizes": sizes | {"intermediate_size": 2 * options.hidden}}
    return Cell(**{"tokens": tokens, "ranks": ranks, "ways": ways, **own, **fields})


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """A record per cell."""
    made, records = here(), []
    over = product(options.emulate or [None], options.mixers, options.patterns, options.tokens, options.ranks)
    for rate, mixer, pattern, tokens, ranks in over:
        for way in options.ways:
            cell = cell_of(options, tokens, ranks, (way,), mixer=mixer, pattern=pattern, rate=rate)
            records += records_of(cell)
    return {"machine": made, "records": records}


def show(figures: dict[str, Any]) -> None:
    """A line per cell."""
    headings = ["network", "mixer", "pattern", "tokens", "ranks", "way", "tokens/s", "peak, MB", "received, KB"]
    rows = [
        [record[name] for name in ("network", "mixer", "pattern", "tokens", "ranks", "way")]
        + [shown(record, *what) for what in (("rate",), ("peak_bytes", 1e-6), ("received", 1e-3), ("waited", 1e3))]
        for record in figures["records"]
    ]
    print(markdown([*headings, "waited, ms"], rows))
    show_machine(figures)


def show_machine(figures: dict[str, Any]) -> None:
    """Where, and when, and why cells are empty."""
    told, records = figures["machine"], every_record(figures)
    print(
        f"\n{told['chip']}, {told['cores']} cores, a thread a rank, torch {told['torch']}, gloo, {told['date']};",
        end=" ",
    )
    print(f"a load of {told['load']:.1f} when it began.")
    statuses = [r["status"] for r in records if r["status"] not in (OK, OUT_OF_MEMORY, TOO_SLOW, NOT_BEGUN)]
    for status in dict.fromkeys(statuses):
        print(f"{statuses.count(status)} of {len(records)} cells cannot be: {status}")


def every_record(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of all views, where there are views."""
    return figures["records"] if "records" in figures else [r for view in figures["views"].values() for r in view]


def here() -> dict[str, Any]:
    """The machine, the day, and how busy it is."""
    return machine(1) | {"cores": cores(), "load": os.getloadavg()[0], "date": str(date.today())}
