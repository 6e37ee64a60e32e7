"""Retention: which checkpoints of a run stay, and the end of those that do not."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lasp.train.checkpoints.comparison import RUN
from lasp.train.checkpoints.folders import checkpoint_step, leftovers, list_checkpoints, remove, retire
from lasp.train.checkpoints.manifest import read_json
from lasp.train.config import TrainConfig


class Retention:
    """Deletes what is not to stay. What cannot be deleted is told once, and training goes on."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._told: set[str] = set()

    def delete_superseded(self, folder: Path) -> None:
        """Delete the checkpoints in a folder that are not to stay; without `keep_last`, none that its own run was asked
        for."""
        with self._telling(f"what is superseded in {str(folder)!r}"):
            for old in superseded(list_checkpoints(folder), self._config):
                if self._config.keep_last is not None or not was_asked(old):
                    with self._telling(repr(str(old))):
                        self.delete(old)

    def delete_leftovers(self, folder: Path) -> None:
        """Remove what a process that was killed while saving or deleting has left."""
        for path in leftovers(folder):
            with self._telling(repr(str(path))):
                remove(path)

    def delete(self, path: Path) -> None:
        """Delete a checkpoint, which from the first moment is none any more. OSError where it stays one."""
        gone = retire(path)
        with self._telling(repr(str(gone))):
            remove(gone)

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """A warning in the place of an OSError."""
        try:
            yield
        except OSError as error:
            told = f"cannot delete {what}: {error}"
            if told not in self._told:
                logging.getLogger(__name__).warning("%s", told)
            self._told.add(told)


def superseded(present: list[Path], config: TrainConfig) -> list[Path]:
    """Which of these checkpoints of a run, oldest first, are not to stay."""
    newest = present[-(config.keep_last or 2) :]
    steps = [config.keep_every, config.save_every if config.keep_last is None else None]
    stay = [any(every and checkpoint_step(path) % every == 0 for every in steps) for path in present]
    return [path for path, stays in zip(present, stay, strict=True) if not stays and path not in newest]


def was_asked(path: Path) -> bool:
    """Whether a checkpoint is one that the run which wrote it was asked for, by `save_every` or as its last; also where
    that cannot be known."""
    try:
        run = read_json(path, RUN)
        every, steps = run["save_every"], run["steps"]
    except (ValueError, KeyError):
        return True
    step = checkpoint_step(path)
    return step == steps or (isinstance(every, int) and every > 0 and step % every == 0)
