"""Panels: a drawing of each view of `lasp bench scaling` that has cells which trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lasp.launch.bench.cells import OK, Records, columns
from lasp.launch.bench.ways import DATA_PARALLEL


def draw(views: dict[str, Records], path: Path) -> None:
    """The panels of some views side by side, into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done = {name: [r for r in records if r["status"] == OK] for name, records in views.items()}
    panels = [(panel, done[name]) for name, panel in PANELS.items() if done.get(name)]
    figure = Figure(figsize=(5.5 * max(1, len(panels)), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (panel, records) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        panel(axes, records)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=90, metadata={"Software": None})


def _grid(axes: Any, records: Records) -> None:
    longest = max(r["tokens"] for r in records)
    _lines(axes, [r for r in records if r["tokens"] == longest], "rate")
    axes.set(xlabel="ranks", ylabel="tokens/s", title=f"a sequence of {longest} tokens")


def _share(axes: Any, records: Records) -> None:
    network = columns(records, "network")[-1]
    here = [r for r in records if r["network"] == network]
    beside = {r["ranks"]: r["rate"] for r in here if r["way"] == DATA_PARALLEL}
    _lines(axes, [r | {"share": 100 * r["rate"] / beside[r["ranks"]]} for r in here if r["ranks"] in beside], "share")
    axes.set(xlabel="ranks", ylabel="% of data parallel", title=f"as many tokens on each rank, {network}")


def _longest(axes: Any, records: Records) -> None:
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for record in sorted(records, key=lambda r: r["tokens"]):
        best[record["way"], record["ranks"]] = record
    _lines(axes, list(best.values()), "tokens")
    axes.set(
        xlabel="ranks", ylabel="tokens", title=f"the longest sequence in {records[0]['memory_limit']} GiB of a rank"
    )


def _documents(axes: Any, records: Records) -> None:
    ways = columns(records, "way")
    for place, (label, packed) in enumerate((("one text", False), ("documents", True))):
        rates = {r["way"]: r["rate"] for r in records if bool(r["documents"]) == packed}
        where = [number + 0.4 * place for number, way in enumerate(ways) if way in rates]
        axes.bar(where, [rates[way] for way in ways if way in rates], width=0.4, label=label)
    axes.set_xticks([number + 0.2 for number in range(len(ways))], ways, rotation=45)
    told = records[0]
    axes.set(ylabel="tokens/s", title=f"{told['tokens']} tokens on {told['ranks']} ranks")


def _lines(axes: Any, records: Records, field: str) -> None:
    """A line for each way, over the ranks."""
    for way in columns(records, "way"):
        own = sorted((r["ranks"], r[field]) for r in records if r["way"] == way)
        axes.plot(*zip(*own, strict=True), marker="o", label=way)
    axes.set_xticks(sorted(columns(records, "ranks")))


PANELS = {"grid": _grid, "share": _share, "longest": _longest, "documents": _documents}
