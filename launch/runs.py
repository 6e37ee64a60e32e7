"""`lasp runs FOLDER`: the runs in a folder, the state of each and how far it is."""

import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from lasp.launch.cli import Parser
from lasp.launch.lock import holder
from lasp.launch.outcome import Outcome
from lasp.train.checkpoints.comparison import RUN
from lasp.train.checkpoints.folders import checkpoint_folder, checkpoint_step, list_checkpoints
from lasp.train.checkpoints.manifest import read_json
from lasp.train.metrics import read_metrics
from lasp.train.status import Status, read_status


class State(NamedTuple):
    """Of a run. steps: of the last checkpoint's configuration, None where there is no checkpoint."""

    name: str
    word: str
    """"running"; "done", all of its steps; "stopped", told to, and saved; "failed", by an error of its own, which
    `told` says; "crashed", killed from outside, or by the failure of another rank than the first. Resuming goes on with
    the last three. "no checkpoint" where a run left neither a word of its own nor a checkpoint; "unreadable" where its
    files, or a folder that may be one, cannot be read: `told` says why."""

    step: int
    steps: int | None
    saved: int | None
    loss: float | None
    changed: float
    """When the last step was, in seconds since 1970; 0 where that cannot be read."""

    told: str = ""
    """What it failed by, or cannot be read by."""


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
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.changed)) if state.changed else ""
        saved = "" if state.saved is None else str(state.saved)
        rows.append((state.name, state.word, step, loss, saved, f"{when}  {state.told}".rstrip()))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def find_runs(folder: Path) -> list[State]:
    """The runs right below a folder, or that folder itself where it is one, by name; ValueError where it is none."""
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is no folder")
    below = sorted(path for path in folder.iterdir() if os.path.isdir(path))
    return [state_of(path) for path in ([folder] if _is_run(folder) else below) if _is_run(path)]


def state_of(folder: Path) -> State:
    """How far the run with this output folder is."""
    try:
        return _read(folder)
    except OSError as error:  # one that cannot be read hides no other
        return State(_printable(folder.name), "unreadable", 0, None, None, None, 0.0, _printable(str(error)))


def _read(folder: Path) -> State:
    metrics = folder / "metrics.jsonl"
    done, status = read_metrics(metrics), read_status(folder)
    saved = list_checkpoints(checkpoint_folder(folder))
    last = checkpoint_step(saved[-1]) if saved else None
    steps = status.steps if status is not None else _steps_of(saved[-1]) if saved else None
    step, loss = (done[-1].step, done[-1].loss) if done else (last or 0, None)
    changed = (metrics if done else folder).stat().st_mtime
    word, told = _word(folder, status, last, steps)
    return State(_printable(folder.name), word, step, steps, last, loss, changed, told)


def _word(folder: Path, status: Status | None, last: int | None, steps: int | None) -> tuple[str, str]:
    """The state, and what a run that failed says. last: the step of the last checkpoint."""
    if holder(folder) is not None:
        return "running", ""
    if status is not None:
        return ("crashed" if status.word == "running" else status.word), _printable(" ".join(status.told.split()))[:80]
    return ("no checkpoint" if last is None else "done" if last == steps else "stopped"), ""


def _steps_of(checkpoint: Path) -> int | None:
    try:
        steps = read_json(checkpoint, RUN).get("steps")
    except ValueError:
        return None
    return steps if isinstance(steps, int) else None


def _printable(text: str) -> str:
    """Without what a terminal would obey: names and messages may come from anywhere."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _is_run(folder: Path) -> bool:
    """Whether it is one, or may be one and cannot be looked into."""
    there = os.path.isfile(folder / "metrics.jsonl") or os.path.isdir(checkpoint_folder(folder))
    return there or not os.access(folder, os.R_OK | os.X_OK)


if __name__ == "__main__":
    sys.exit(main())
