"""Where the checkpoints of a run lie: their names, in order, and what remains of those that did not get one."""

import logging
import re
import shutil
from pathlib import Path

from lasp.train.config import TrainConfig

_LOG = logging.getLogger(__name__)
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


def superseded(present: list[Path], config: TrainConfig) -> list[Path]:
    """Which of these checkpoints of a run, oldest first, are not to stay."""
    newest = present[-(config.keep_last or 2) :]
    steps = [config.keep_every, config.save_every if config.keep_last is None else None]
    stay = [any(every and checkpoint_step(path) % every == 0 for every in steps) for path in present]
    return [path for path, stays in zip(present, stay, strict=True) if not stays and path not in newest]


def delete_checkpoint(path: Path) -> None:
    """Remove a checkpoint, which from the first moment is none any more. OSError where it stays one; for what remains
    of it otherwise, a warning."""
    gone = path.with_name(f".{path.name}.deleted")
    path.rename(gone)
    _remove(gone)


def delete_checkpoints(output: str | Path) -> None:
    """Remove the checkpoints of an output folder, complete or not; whatever else lies there stays."""
    delete_partial(checkpoint_folder(output))
    for path in list_checkpoints(checkpoint_folder(output)):
        delete_checkpoint(path)


def delete_partial(folder: Path) -> None:
    """Remove what a process that was killed while saving or deleting has left, with a warning where that stays."""
    for path in folder.glob(".step-*"):
        if _PARTIAL.fullmatch(path.name):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a folder and what is in it; of a link the link alone: somebody has moved a checkpoint to another disk."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        _LOG.warning("cannot remove %r, which is no checkpoint any more: %s", str(path), error)
