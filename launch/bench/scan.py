"""Scans over ranks, on the loopback or over a network as slow as one likes: what each takes, beside its prediction.

Ranks are gloo processes of this machine. `--emulate rate=1gbit` gives each a network namespace whose interface sends
no faster (as root); several rates are several networks. Predictions are of `parallel/cost.py`, with the latency and
the bandwidth that the ranks measure beforehand. Then the same within a step of a layer (`layers.py`): how long the
exchanges are on their way, how long a rank waits for them, and what they add to the step: their exposed time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lasp.launch.bench import scan_rank
from lasp.launch.bench.layers import OPERATIONS, SEEN
from lasp.launch.bench.options import at_least, network_rate
from lasp.launch.bench.ranks import Start, run
from lasp.launch.bench.table import markdown
from lasp.launch.bench.timing import machine
from lasp.launch.network import Network, bits_per_second, network
from lasp.parallel.scan import SCANS, Heads

TOLD = ("ranks", "mib", "scans", "blocks", "layers", "tokens", "heads", "repeat")
NEAR, CLOSE = 0.25, 0.10
"""How far a prediction may be off, and the choice of "auto" from the best, to count as right."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The ranks, the states, and the networks."""
    parser.add_argument("--ranks", type=at_least(2), default=4)
    parser.add_argument("--mib", type=at_least(1), nargs="+", default=[1, 4, 16], help="of a state")
    parser.add_argument("--scans", nargs="+", choices=(*SCANS, Heads.name), default=[*SCANS, Heads.name])
    parser.add_argument("--blocks", type=at_least(1), metavar="N", help="of a pipeline, by default as the model says")
    parser.add_argument(
        "--layers", nargs="*", choices=OPERATIONS, default=list(OPERATIONS), help="none: exchanges alone"
    )
    parser.add_argument("--tokens", type=at_least(1), default=2048, help="of a layer, on each rank")
    parser.add_argument("--heads", type=at_least(1), default=8, help="of a layer")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what was measured over what was predicted")
    parser.add_argument(
        "--emulate", type=network_rate, nargs="+", metavar="rate=RATE", help="such as rate=1gbit rate=200mbit"
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Per network and size of a state, and per layer, the median seconds of every scan, and what was predicted."""
    told = {name: getattr(options, name) for name in TOLD}
    networks = [_run(told, rate) for rate in options.emulate or [None]]
    figures = {"machine": machine(torch.get_num_threads()), **told, "networks": networks}
    if options.plot:
        plot(figures, options.plot)
    return figures


def show(figures: dict[str, Any]) -> None:
    """A line per network, size and scan; and how often predictions and the choice were right."""
    headings = ["network", "MiB", "scan", "received, MiB", "steps", "measured, ms", "predicted, ms", "off"]
    rows, near, close = [], [], []
    for wired in figures["networks"]:
        for cell in wired["cells"]:
            best = min(scan["seconds"] for scan in cell["scans"])
            chosen = min(cell["scans"], key=lambda scan: scan["predicted"])
            close.append(chosen["seconds"] <= best * (1 + CLOSE))
            for scan in cell["scans"]:
                off, taken, guess = (
                    scan["predicted"] / scan["seconds"] - 1,
                    1e3 * scan["seconds"],
                    1e3 * scan["predicted"],
                )
                near.append(abs(off) <= NEAR)
                marks = (" (chosen)" if scan is chosen else "") + (" (best)" if scan["seconds"] == best else "")
                rows.append(
                    [wired["network"], cell["mib"], scan["scan"] + marks, f"{scan['received'] / 2**20:.1f}",
                     scan["steps"], f"{taken:.1f}", f"{guess:.1f}", f"{100 * off:+.0f} %"]
                )  # fmt: skip
    print(markdown(headings, rows))
    _show_layers(figures)
    for wired in figures["networks"]:
        latency, bandwidth, hop, share, gap = wired["wire"]
        told = (
            f"{1e6 * latency:.0f} us, behind one another {1e6 * gap:.0f} us, in a collective {1e6 * hop:.0f} us, "
            f"and {8 * bandwidth / 1e6:.0f} Mbit/s a rank, of which a collective reaches {100 * share:.0f} %"
        )
        print(f"\n{wired['network']}: measured {told}", end="")
    print(f"\n\nOf exchanges alone, {sum(near)} of {len(near)} predictions within {100 * NEAR:.0f} %; ", end="")
    print(f"the scan chosen within {100 * CLOSE:.0f} % of the best in {sum(close)} of {len(close)}")
    made = figures["machine"]
    print(f"{figures['ranks']} ranks on {made['chip']}, {made['threads']} threads in all, torch {made['torch']}, gloo")


def _show_layers(figures: dict[str, Any]) -> None:
    """A line per network, layer and scan."""
    headings = ["network", "layer", "by", "received, MiB", "steps", "step, ms", "exchange predicted", "on its way"]
    headings += ["waited for", "exposed"]
    rows = [
        [wired["network"], row["layer"], row["method"], f"{row['received'] / 2**20:.1f}", row["steps"]]
        + [f"{1e3 * row[name]:.1f}" for name in ("seconds", "predicted", "flight", "waited", "exposed")]
        for wired in figures["networks"]
        for row in wired["layers"]
    ]
    if rows:
        print(f"\nA layer of {figures['heads']} heads of 128, {figures['tokens']} tokens a rank; there and back:\n")
        print(markdown(headings, rows))


def plot(figures: dict[str, Any], path: Path) -> None:
    """Exchanges alone: a point for each, by scan, beside the line on which predictions are right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points: dict[str, list[tuple[float, float]]] = {}
    for wired in figures["networks"]:
        for scan in (scan for cell in wired["cells"] for scan in cell["scans"]):
            name = scan["scan"].partition("(")[0]
            points.setdefault(name, []).append((1e3 * scan["predicted"], 1e3 * scan["seconds"]))
    for name, measured in points.items():
        axes.plot(*zip(*measured, strict=True), marker="o", linestyle="", label=name)
    ends = [f(x for own in points.values() for pair in own for x in pair) for f in (min, max)]
    for factor, style in ((1, "-"), (1 + NEAR, ":"), (1 / (1 + NEAR), ":")):
        axes.plot(ends, [factor * end for end in ends], style, color="gray", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="predicted, ms", ylabel="measured, ms")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _run(told: dict[str, Any], rate: str | None) -> dict[str, Any]:
    """What the ranks tell of a run over one network: of exchanges rank 0, of layers each what it saw."""
    emulated = nullcontext() if rate is None else network(told["ranks"], bits_per_second(rate))
    with tempfile.TemporaryDirectory() as folder, emulated as wired:
        shared = json.dumps(told | {"store": f"file://{folder}/store"})
        found = run(scan_rank.__file__, [_start(shared, rank, wired) for rank in range(told["ranks"])])
    layers = [_slowest(rows) for rows in zip(*(rank["layers"] for rank in found), strict=True)]
    return {"network": "loopback" if rate is None else rate.removeprefix("rate="), **found[0], "layers": layers}


def _slowest(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of what all ranks saw of a layer, the most."""
    return rows[0] | {name: max(row[name] for row in rows) for name in (*SEEN, "received")}


def _start(shared: str, rank: int, wired: Network | None) -> Start:
    start = Start([str(rank), shared], {"OMP_NUM_THREADS": "1"})
    if wired is None:
        return start
    return start._replace(environment={**start.environment, **wired.environment}, within=wired.command(rank))
