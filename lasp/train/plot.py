"""The picture of losses: one run's own, or several in one."""

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lasp.train.files import replaced
from lasp.train.metrics import StepMetrics


def draw(runs: Mapping[str, Sequence[StepMetrics]], picture: Path, smooth: int | None = None) -> None:
    """Draw the losses of runs over their steps, and those of what is held out, into a PNG, SVG or PDF file.

    smooth: at each step the mean of so many losses, by default a fiftieth of them all; behind it, faint, the losses.
    """
    # A figure is a circle of objects, megabytes of them, which grow old while it is drawn: of old ones Python looks for
    # circles hardly ever, where there are many others. Nothing grows old meanwhile, and the young ones are looked at.
    collecting = gc.isenabled()
    gc.disable()
    try:
        _draw(runs, picture, smooth)
    finally:
        gc.collect(0)
        if collecting:
            gc.enable()


def _draw(runs: Mapping[str, Sequence[StepMetrics]], picture: Path, smooth: int | None) -> None:
    # The object interface: pyplot would keep global state and ask for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes, named = figure.add_subplot(), {}
    for name, metrics in runs.items():
        steps, losses = [m.step for m in metrics], [m.loss for m in metrics]
        window = max(1, len(losses) // 50) if smooth is None else smooth
        (line,) = axes.plot(steps, smoothed(losses, window), linewidth=1.2)
        named[name] = line
        if window > 1:
            axes.plot(steps, losses, linewidth=0.6, alpha=0.25, color=line.get_color())
        for source, held in _held_out(metrics).items():
            (dots,) = axes.plot(*zip(*held, strict=True), marker="o", linestyle="--", color=line.get_color())
            named[f"{name}, held out of {source}"] = dots
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Training loss")
    axes.grid(alpha=0.3)
    # Put in afterwards: a name of a folder is no formula ("$"), and one that begins with "_" is told as well.
    legend = axes.legend(named.values(), ["run"] * len(named))
    for text, name in zip(legend.get_texts(), named, strict=True):
        text.set(text=name.encode(errors="replace").decode(), parse_math=False)  # names of files may be any bytes
    picture.parent.mkdir(parents=True, exist_ok=True)
    with replaced(picture) as partial:  # who looks meanwhile sees the last one
        figure.savefig(partial, dpi=120)


def smoothed(losses: Sequence[float], steps: int) -> list[float]:
    """At each step the mean of the last `steps` losses, or of as many as there are, without those that are not
    finite."""
    values = np.asarray(losses, dtype=float)
    known = np.isfinite(values)
    sums, counts = (np.concatenate([[0.0], np.cumsum(x)]) for x in (np.where(known, values, 0.0), known))
    first = np.maximum(np.arange(1, len(values) + 1) - steps, 0)
    with np.errstate(invalid="ignore"):
        means: list[float] = ((sums[1:] - sums[first]) / (counts[1:] - counts[first])).tolist()
    return means


def _held_out(metrics: Sequence[StepMetrics]) -> dict[str, list[tuple[int, float]]]:
    """The steps and losses of what is held out, source by source."""
    found: dict[str, list[tuple[int, float]]] = {}
    for step in metrics:
        for source, loss in (step.validation or {}).items():
            found.setdefault(source, []).append((step.step, loss))
    return found
