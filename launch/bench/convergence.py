"""Short training runs, mixer by mixer: the same data, steps and sizes, pure and hybrid, beside softmax attention.

Each run is `lasp train convergence` with one mixer and one pattern, in a process of its own. A loss is the mean over
the last steps of a run, each of which saw text that no step before had seen.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lasp.launch.bench.timing import machine
from lasp.launch.configuration import read_config
from lasp.train.metrics import read_metrics

# The six modules of LASP-2's table 2, and two of the delta family.
MIXERS = ("linear", "lightning", "retention", "gla", "based", "rebased", "gated_deltanet", "kda")
PATTERNS = {"pure": "L", "1/4 hybrid": "LLLN"}
SOFTMAX = "softmax"
RECIPE = "convergence"
LAST_STEPS = 20


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which mixers, how long, and how many runs at a time."""
    parser.set_defaults(repeat=1)  # each repetition is a seed
    parser.add_argument("--mixers", nargs="*", default=list(MIXERS), help="names in lasp.layers.MIXERS")
    parser.add_argument("--steps", type=int, default=read_config([RECIPE]).steps)
    parser.add_argument("--jobs", type=int, default=torch.get_num_threads(), help="runs at a time, one thread each")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the losses over the steps into a PNG")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The loss of every step of every run, by mixer, pattern and seed, and the mean over the last ones."""
    runs = [(mixer, name) for mixer in options.mixers for name in PATTERNS] + [(SOFTMAX, "pure")]
    seeds = range(options.repeat)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        jobs = {
            (mixer, pattern, seed): pool.submit(_train, mixer, pattern, seed, options.steps, Path(folder))
            for (mixer, pattern), seed in itertools.product(runs, seeds)
        }
        curves = {key: job.result() for key, job in jobs.items()}
    figures: dict[str, Any] = {"machine": machine(1), "steps": options.steps, "seeds": options.repeat, "runs": []}
    for mixer, pattern in runs:
        losses = [curves[mixer, pattern, seed] for seed in seeds]
        last = [sum(curve[-LAST_STEPS:]) / len(curve[-LAST_STEPS:]) for curve in losses]
        figures["runs"].append(
            {"mixer": mixer, "pattern": pattern, "loss": sum(last) / len(last), "by_seed": last, "curves": losses}
        )
    if options.plot:
        _plot(figures, options.plot)
    return figures


def show(figures: dict[str, Any]) -> None:
    """The table of losses, mixer by mixer."""
    seeds = "1 seed" if figures["seeds"] == 1 else f"{figures['seeds']} seeds"
    table = Table(title=f"loss after {figures['steps']} steps, nats per byte, mean of {seeds}")
    for heading in ("mixer", *PATTERNS):
        table.add_column(heading, justify="left" if heading == "mixer" else "right")
    losses = {(run["mixer"], run["pattern"]): run["loss"] for run in figures["runs"]}
    for mixer in dict.fromkeys(run["mixer"] for run in figures["runs"]):
        found = (losses.get((mixer, pattern)) for pattern in PATTERNS)
        table.add_row(mixer, *("" if loss is None else f"{loss:.3f}" for loss in found))
    Console().print(table)


def _train(mixer: str, pattern: str, seed: int, steps: int, folder: Path) -> list[float]:
    """The losses of one run, in a process of its own with one thread."""
    output = folder / f"{mixer}-{PATTERNS[pattern]}-{seed}"
    changes = {"output": output, "data.cache": folder / "tokens", "seed": seed, "steps": steps}
    changes |= {"model.mixer": mixer, "model.pattern": PATTERNS[pattern]}
    arguments = [f"--{key}={value}" for key, value in changes.items()]
    command = [sys.executable, "-m", "lasp.launch.train", RECIPE, *arguments]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the run of {mixer!r}, {pattern}, failed: {done.stderr.strip()[-500:]}")
    return [metrics.loss for metrics in read_metrics(output / "metrics.jsonl")]


def _plot(figures: dict[str, Any], path: Path) -> None:
    """One panel per pattern: the losses of the first seed, smoothed, softmax attention in both."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(PATTERNS), sharey=True)
    for axes, pattern in zip(panels, PATTERNS, strict=True):
        for run in figures["runs"]:
            if run["pattern"] == pattern or run["mixer"] == SOFTMAX:
                axes.plot(_smooth(run["curves"][0]), label=run["mixer"], linewidth=1)
        axes.set(xlabel="step", title=pattern)
        axes.grid(alpha=0.3)
    window = min(LAST_STEPS, figures["steps"])
    panels[0].set(ylabel=f"loss (nats per byte, mean of {window} step{'s' * (window > 1)})")
    panels[-1].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _smooth(losses: list[float]) -> list[float]:
    """The mean of each step and those before it, LAST_STEPS in all where there are as many."""
    windows = (losses[max(0, end - LAST_STEPS) : end] for end in range(1, len(losses) + 1))
    return [sum(window) / len(window) for window in windows]
