"""`lasp runs FOLDER`: the runs in a folder, the state of each and how far it is."""

import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

from lasp.launch.cli import Parser
from lasp.launch.lock import holder
from lasp.launch.outcome import Outcome
from lasp.train.checkpoints.folders import checkpoint_folder, checkpoint_step, list_checkpoints
from lasp.train.metrics import read_metrics


class State(NamedTuple):
    """Of a run. steps: of the last checkpoint's configuration, None where there is no checkpoint."""

    name: str
    word: str
    """"running", "done", "stopped" (resuming goes on), or "no checkpoint"."""

    step: int
    steps: int | None
    saved: int | None
    loss: float | None
    changed: float
    """When the last step was, in seconds since 1970."""


def main(argv: list[str] | None = None) -> int:
    """Print a line per run. Exit code 2 for a folder that is none."""
    return Outcome.of(lambda: _print(sys.argv[1:] if argv is None else argv)).tell()


def _print(arguments: list[str]) -> int:
    parser = Parser(prog="lasp runs", description=__doc__)
    parser.add_argument("folder", nargs="?", default="runs", help="whose folders are runs, by default ./runs")
    folder = Path(parser.parse_args(arguments).folder)
    rows = [("run", "state", "step", "loss", "saved", "last step")]
    for state in find_runs(folder):
        loss = "" if state.loss is None else f"{state.loss:.3f}"
        step = str(state.step) if state.steps is None else f"{state.step}/{state.steps}"
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.changed))
        rows.append((state.name, state.word, step, loss, "" if state.saved is None else str(state.saved), when))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def find_runs(folder: Path) -> list[State]:
    """The runs right below a folder, or that folder itself where it is one, by name; ValueError where it is none."""
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder")
    below = sorted(path for path in folder.iterdir() if path.is_dir())
    return [state_of(path) for path in ([folder] if _is_run(folder) else below) if _is_run(path)]


def state_of(folder: Path) -> State:
    """How far the run with this output folder is. ValueError, naming the file, where its metrics cannot be read."""
    metrics = folder / "metrics.jsonl"
    try:
        done = read_metrics(metrics)
    except (ValueError, TypeError) as error:
        raise ValueError(f"cannot read {str(metrics)!r}: {error}") from error
    saved = list_checkpoints(checkpoint_folder(folder))
    steps = json.loads((saved[-1] / "run.json").read_text(encoding="utf-8"))["steps"] if saved else None
    last = checkpoint_step(saved[-1]) if saved else None
    word = "no checkpoint" if last is None else "done" if last == steps else "stopped"
    if holder(folder) is not None:
        word = "running"
    step, loss = (done[-1].step, done[-1].loss) if done else (last or 0, None)
    changed = (metrics if done else folder).stat().st_mtime
    return State(folder.name, word, step, steps, last, loss, changed)


def _is_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() or checkpoint_folder(folder).is_dir()


if __name__ == "__main__":
    sys.exit(main())
