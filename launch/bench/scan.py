"""Scans over ranks, on the loopback or over a network as slow as one likes: what each takes, beside its prediction.

Ranks are gloo processes of this machine. `--emulate rate=1gbit` gives each a network namespace whose interface sends
no faster (as root); several rates are several networks. Predictions are of `parallel/cost.py`, with the latency and
the bandwidth that the ranks measure beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from typing import Any

import torch

from lasp.launch.bench import scan_rank
from lasp.launch.bench.options import at_least, network_rate
from lasp.launch.bench.table import markdown
from lasp.launch.bench.timing import machine
from lasp.launch.network import Network, bits_per_second, network
from lasp.parallel.scan import SCANS

NEAR, CLOSE = 0.25, 0.10
"""How far a prediction may be off, and the choice of "auto" from the best, to count as right."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The ranks, the states, and the networks."""
    parser.add_argument("--ranks", type=at_least(2), default=4)
    parser.add_argument("--mib", type=at_least(1), nargs="+", default=[1, 4, 16], help="of a state")
    parser.add_argument("--scans", nargs="+", choices=SCANS, default=list(SCANS))
    parser.add_argument(
        "--emulate", type=network_rate, nargs="+", metavar="rate=RATE", help="such as rate=1gbit rate=200mbit"
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Per network and size of a state the median seconds of every scan, and what was predicted."""
    told = {"ranks": options.ranks, "mib": options.mib, "scans": options.scans, "repeat": options.repeat}
    networks = [_run(told, rate) for rate in options.emulate or [None]]
    return {"machine": machine(torch.get_num_threads()), "ranks": options.ranks, "networks": networks}


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
    for wired in figures["networks"]:
        latency, bandwidth, hop = wired["wire"]
        told = (
            f"{1e6 * latency:.0f} us, in a collective {1e6 * hop:.0f} us, and {8 * bandwidth / 1e6:.0f} Mbit/s a rank"
        )
        print(f"\n{wired['network']}: measured {told}", end="")
    print(f"\n\n{sum(near)} of {len(near)} predictions within {100 * NEAR:.0f} %; ", end="")
    print(f"the scan chosen within {100 * CLOSE:.0f} % of the best in {sum(close)} of {len(close)}")
    made = figures["machine"]
    print(f"{figures['ranks']} ranks on {made['chip']}, {made['threads']} threads in all, torch {made['torch']}, gloo")


def _run(told: dict[str, Any], rate: str | None) -> dict[str, Any]:
    """What rank 0 tells of a run over one network."""
    emulated = nullcontext() if rate is None else network(told["ranks"], bits_per_second(rate))
    with tempfile.TemporaryDirectory() as folder, emulated as wired:
        shared = json.dumps(told | {"store": f"file://{folder}/store"})
        ranks = [_start(shared, rank, wired) for rank in range(told["ranks"])]
        outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"the ranks ended with {[rank.returncode for rank in ranks]}")
    found: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return {"network": "loopback" if rate is None else rate.removeprefix("rate="), **found}


def _start(shared: str, rank: int, wired: Network | None) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", scan_rank.__file__, str(rank), shared]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if wired is not None:
        command, environment = [*wired.command(rank), *command], environment | wired.environment
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
