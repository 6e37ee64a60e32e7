"""Where the checkpoints of a run lie: their names, in order, and what remains of those that did not get one."""

import re
import shutil
from pathlib import Path

_NAME = re.compile(r"step-(\d{6,})", re.ASCII)
_PARTIAL = re.compile(rf"\.{_NAME.pattern}\.\w+", re.ASCII)


def checkpoint_folder(output: str | Path) -> Path:
    """Where a run with this output folder keeps its checkpoints."""
    return Path(output) / "checkpoints"


def checkpoint_path(output: str | Path, step: int) -> Path:
    """The folder of the checkpoint that is written after `step` steps."""
    return checkpoint_folder(output) / f"step-{step:06d}"


def partial_path(path: Path) -> Path:
    """What a checkpoint is called as long as it is written."""
    return path.with_name(f".{path.name}.partial")


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest step first; none where there is no such folder. OSError where it
    cannot be read."""
    try:
        found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """How many steps a checkpoint has behind it; ValueError when its folder is not named after them."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{str(path)!r} is not a checkpoint: its name is not of the form step-000150")
    return int(match[1])


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name that no run takes for one, and none will want; returns it."""
    number, aside = 1, path.with_name(f"{path.name}.damaged")
    while aside.exists():
        number, aside = number + 1, path.with_name(f"{path.name}.damaged-{number}")
    path.rename(aside)
    return aside


def retire(path: Path) -> Path:
    """Give a checkpoint a name that is none, under which it is removed; returns it."""
    gone = path.with_name(f".{path.name}.deleted")
    path.rename(gone)
    return gone


def leftovers(folder: Path) -> list[Path]:
    """What a process that was killed while saving or deleting has left in a folder."""
    return [path for path in folder.glob(".step-*") if _PARTIAL.fullmatch(path.name)]


def remove(path: Path) -> None:
    """Remove a folder and what is in it; of a link the link alone: somebody has moved a checkpoint to another disk."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
