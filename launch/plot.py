"""`lasp plot RUN...`: the losses of several runs in one picture."""

import sys
from collections.abc import Sequence
from pathlib import Path

from lasp.launch.cli import Parser
from lasp.launch.outcome import Outcome
from lasp.train.metrics import StepMetrics, read_metrics

FORMATS = (".png", ".svg", ".pdf")


def main(argv: list[str] | None = None) -> int:
    """Draw. Exit code 2 for a run without metrics, or a picture of an unknown kind."""
    return Outcome.of(lambda: _plot(sys.argv[1:] if argv is None else argv)).tell()


def _plot(arguments: list[str]) -> int:
    parser = Parser(prog="lasp plot", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run")
    parser.add_argument("--output", default="loss.png", help=f"the picture ({', '.join(FORMATS)}), by default loss.png")
    parser.add_argument("--smooth", type=int, default=1, metavar="STEPS", help="draw means over so many steps")
    options = parser.parse_args(arguments)
    picture = Path(options.output)
    if picture.suffix not in FORMATS:
        raise ValueError(f"--output must end in {', '.join(FORMATS)}, got {options.output!r}")
    if options.smooth < 1:
        raise ValueError(f"--smooth must be at least 1, got {options.smooth}")
    runs = {run: _metrics(Path(run)) for run in options.runs}
    _draw(runs, options.smooth, picture)
    print(picture)
    return 0


def smoothed(losses: Sequence[float], steps: int) -> list[float]:
    """At each step the mean of the last `steps` losses, or of as many as there are."""
    windows = (losses[max(0, place + 1 - steps) : place + 1] for place in range(len(losses)))
    return [sum(window) / len(window) for window in windows]


def _metrics(run: Path) -> list[StepMetrics]:
    path = run / "metrics.jsonl"
    try:
        found = read_metrics(path)
    except (ValueError, TypeError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from error
    if not found:
        raise ValueError(f"{str(run)!r} is no run with steps: there are none in {str(path)!r}")
    return found


def _draw(runs: dict[str, list[StepMetrics]], smooth: int, picture: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, metrics in runs.items():
        losses = smoothed([step.loss for step in metrics], smooth)
        (line,) = axes.plot([step.step for step in metrics], losses, linewidth=1.2, label=name)
        held = [step for step in metrics if step.validation]
        for source in dict.fromkeys(source for step in held for source in step.validation or {}):
            known = [
                (step.step, step.validation[source]) for step in held if step.validation and source in step.validation
            ]
            label = f"{name}, held out of {source}"
            axes.plot(*zip(*known, strict=True), marker="o", linestyle="--", color=line.get_color(), label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
