"""What a plan says: a table of the best candidates, why others lose, JSON, a plot, and the files to train by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lasp.launch.bench.table import markdown
from lasp.launch.plan.candidate import LEVERS, Candidate, Job
from lasp.launch.plan.estimate import Estimate, memory_of
from lasp.launch.plan.footprint import Footprints
from lasp.launch.simulate.machine import Machine

GIB = 2**30


def table(estimates: Sequence[Estimate], price: float | None, most: int) -> str:
    """The best ones first, then memory and time of the best by item, and why the others lose."""
    headings = ["layout", "GiB", "s/step", "tokens/s", "MFU, %", "waiting, %"] + ["per 1e9 tokens"] * (
        price is not None
    )
    fit = [e for e in estimates if e.fits]
    rows = [
        [e.candidate, f"{e.bytes / GIB:.1f}", f"{e.seconds:.3g}", f"{e.rate:.4g}", f"{100 * e.mfu:.1f}",
         f"{100 * _waited(e) / e.seconds:.1f}", *([f"{e.cost(price):.2f}"] if price is not None else [])]
        for e in fit[:most]
    ]  # fmt: skip
    parts = [markdown(headings, rows)] if fit else []
    if fit:
        best = fit[0]
        parts.append(markdown(["memory of a rank", "GiB"], _rows(best.memory, GIB)))
        parts.append(markdown(["a step", "ms"], _rows(best.items, 1e-3)))
    large = [e for e in estimates if not e.fits]
    if large:
        least = min(large, key=lambda e: e.bytes)
        limit = least.machine.chip.memory / GIB
        parts.append(f"{len(large)} do not fit {limit:.0f} GiB; the smallest, {least.candidate}: {_largest(least)}")
    return "\n\n".join(parts)


def why(estimate: Estimate, best: Estimate) -> str:
    """What a candidate that fits loses by."""
    if estimate.seconds < best.seconds:
        return "as fast as plans can tell, over more ranks or with more levers"
    more = {name: seconds - best.items.get(name, 0.0) for name, seconds in estimate.items.items()}
    name = max(more, key=more.__getitem__)
    return f"{100 * (estimate.seconds / best.seconds - 1):.1f} % slower, most of all {name}: {1e3 * more[name]:+.3g} ms"


def _largest(estimate: Estimate) -> str:
    name = max(estimate.memory, key=estimate.memory.__getitem__)
    return f"{estimate.bytes / GIB:.1f} GiB, of which {estimate.memory[name] / GIB:.1f} GiB are {name}"


def _waited(estimate: Estimate) -> float:
    return sum(seconds for name, seconds in estimate.items.items() if name.startswith("waiting"))


def _rows(items: dict[str, float], unit: float) -> list[list[object]]:
    found = sorted(((name, value) for name, value in items.items() if value), key=lambda item: -item[1])
    return [[name, f"{value / unit:.3g}"] for name, value in [*found, ("**all**", sum(items.values()))]]


def told(estimates: Sequence[Estimate], price: float | None) -> list[dict[str, Any]]:
    """Everything, for a program."""
    best = next((e for e in estimates if e.fits), None)
    return [
        {
            **asdict(e.candidate), "accumulation": e.candidate.repeat(e.job), "bytes": e.bytes, "memory": e.memory,
            "fits": e.fits,
            "seconds": e.seconds if e.fits else None, "items": e.items, "tokens_per_second": e.rate if e.fits else None,
            "mfu": e.mfu if e.fits else None, "cost": e.cost(price) if price is not None and e.fits else None,
            "why_not": None if e is best else why(e, best) if e.fits and best else _largest(e),
        }
        for e in estimates
    ]  # fmt: skip


# Files --------------------------------------------------------------------------------------------------------------


def config(estimate: Estimate, model: dict[str, Any], dtype: str) -> str:
    """A configuration of `lasp train`, or what to override one with."""
    candidate, job, levers = estimate.candidate, estimate.job, LEVERS[estimate.candidate.levers]
    lines = [
        f"# planned by `lasp plan`: {estimate.rate:.4g} tokens/s and {estimate.bytes / GIB:.1f} GiB per rank expected",
        f'dtype = "{dtype}"', f'engine = "{candidate.engine}"', f"sp = {candidate.sp}", f"dp = {candidate.dp}",
        f'layout = "{candidate.layout}"', f"accumulation = {candidate.repeat(job)}",
    ]  # fmt: skip
    lines += ["", "[data]", f"seq_len = {job.seq}", "batch_size = 1", "", "[memory]"]
    lines += [f"{name} = {_toml(value)}" for name, value in asdict(levers).items() if value is not None]
    if model:
        lines += ["", "[model]", *(f"{name} = {_toml(value)}" for name, value in model.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def launch_line(job: Job, files: Sequence[str]) -> str:
    """What starts the training."""
    first, *others = files
    arguments = " ".join([first, *(f"--config {file}" for file in others)])
    if job.nodes == 1:
        return f"lasp train {arguments}"
    return f"lasp launch torchrun {arguments} --nodes {job.nodes} --gpus {job.gpus} --endpoint HOST:29500"


def longest(candidate: Candidate, machine: Machine, footprints: Footprints) -> int:
    """Tokens of the longest sequence whose planned memory fits."""

    def held(tokens: int) -> float:
        run = footprints.of(candidate.sp, tokens, 0, LEVERS[candidate.levers], candidate.method)
        return sum(memory_of(run, candidate, candidate.dp * candidate.sp, machine.chip).values())

    low, high = 0, 4096  # beyond what any run needs, that short ones follow from
    while held(high) <= machine.chip.memory and high < 1 << 30:
        low, high = high, 2 * high
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        low, high = (middle, high) if held(middle) <= machine.chip.memory else (low, middle)
    return low * candidate.sp


def plot(candidate: Candidate, levers: Sequence[str], machine: Machine, footprints: Footprints, path: Path) -> None:
    """The longest sequence against the ranks that share it, for each lever with those before it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ranks = [1, 2, 4, 8, 16, 32, 64]
    for lever in levers:
        tries = [replace(candidate, dp=1, sp=sp, levers=lever) for sp in ranks]
        axes.plot(ranks, [longest(each, machine, footprints) for each in tries], marker="o", label=lever)
    axes.set(xlabel="ranks that share a sequence", ylabel="longest sequence (tokens)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
