"""`lasp plot RUN...`: the losses of several runs in one picture."""

import sys
from pathlib import Path

from lasp.launch.cli import Parser
from lasp.launch.files import PICTURES, check_outputs
from lasp.launch.outcome import Outcome
from lasp.train.metrics import StepMetrics, read_metrics
from lasp.train.plot import draw


def main(argv: list[str] | None = None) -> int:
    """Draw. Exit code 2 for a run without metrics, or a picture of an unknown kind."""
    return Outcome.of(lambda: _plot(sys.argv[1:] if argv is None else argv)).tell()


def _plot(arguments: list[str]) -> int:
    parser = Parser(prog="lasp plot", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run")
    parser.add_argument(
        "--output", default="loss.png", help=f"the picture ({', '.join(PICTURES)}), by default loss.png"
    )
    parser.add_argument(
        "--smooth", type=int, metavar="STEPS", help="draw means over so many steps, by default a fiftieth of them"
    )
    options = parser.parse_args(arguments)
    picture = Path(options.output)
    if picture.suffix not in PICTURES:
        raise ValueError(f"--output must end in {', '.join(PICTURES)}, got {options.output!r}")
    check_outputs({"--output": picture})
    if options.smooth is not None and options.smooth < 1:
        raise ValueError(f"--smooth must be at least 1, got {options.smooth}")
    runs = {run: _metrics(Path(run)) for run in options.runs}
    draw(runs, picture, options.smooth)
    print(picture)
    return 0


def _metrics(run: Path) -> list[StepMetrics]:
    path = run / "metrics.jsonl"
    found = read_metrics(path)
    if not found:
        raise ValueError(f"{str(run)!r} is no run with steps: there are none in {str(path)!r}")
    return found


if __name__ == "__main__":
    sys.exit(main())
