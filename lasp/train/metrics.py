"""Metrics of a run: one JSON line per step, and a picture of the loss."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self


@dataclass(frozen=True)
class StepMetrics:
    """What is recorded of one step."""

    step: int
    """Steps done, 1 after the first."""

    loss: float
    """Cross-entropy in nats per token, the mean over the whole batch, before the step's update."""

    lr: float
    """Learning rate of the step."""

    grad_norm: float
    """Global norm of the gradients, before clipping."""

    tokens_per_second: float
    """Tokens of the whole batch per second of this step."""

    skipped: int | None = None
    """How many steps in a row, this one included, had a loss or gradients that were not finite, and changed nothing."""

    validation: dict[str, float] | None = None
    """Mean loss of what is held out, source by source, after the step's update; None where it was not asked for."""


class MetricsFile:
    """A JSON-lines file of steps, open for writing. What a resumed run will do again is dropped from it first."""

    def __init__(self, path: Path, steps_done: int = 0) -> None:
        kept = [metrics for metrics in read_metrics(path) if metrics.step <= steps_done] if steps_done else []
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}")
        partial.write_text("".join(_line(metrics) for metrics in kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, metrics: StepMetrics) -> None:
        """Append one step, readable by others at once."""
        self._file.write(_line(metrics))
        self._file.flush()


def read_metrics(path: Path) -> list[StepMetrics]:
    """The steps in a metrics file, none when there is no such file; a last line that was cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [StepMetrics(**json.loads(line)) for line in lines if line.endswith("\n")]


def plot_loss(metrics: list[StepMetrics], path: Path) -> None:
    """Draw the loss over the steps into a PNG file."""
    # The object interface: pyplot would keep global state and ask for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([m.step for m in metrics], [m.loss for m in metrics], linewidth=1.2)
    held = [m for m in metrics if m.validation]
    for source in dict.fromkeys(source for m in held for source in m.validation or {}):
        known = [(m.step, m.validation[source]) for m in held if m.validation and source in m.validation]
        axes.plot(*zip(*known, strict=True), marker="o", label=f"held out of {source}")
    if held:
        axes.legend()
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Training loss")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _line(metrics: StepMetrics) -> str:
    told = {name: value for name, value in asdict(metrics).items() if value is not None}
    return json.dumps(told) + "\n"
