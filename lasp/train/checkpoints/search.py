"""Which checkpoint a run begins with."""

from collections.abc import Callable
from pathlib import Path

from lasp.train.checkpoints.folders import checkpoint_folder, list_checkpoints, set_aside
from lasp.train.checkpoints.manifest import Damaged, Manifest
from lasp.train.config import TrainConfig


def find_checkpoint(config: TrainConfig, tell: Callable[[str], None], look: bool = True) -> Path | None:
    """The checkpoint that `config.resume` asks for, every bit of it as it was written; None to start from scratch.

    resume = "latest" takes the newest that is whole, and tells of newer ones, which are set aside.
    look: at every bit; without it, files and their sizes must do, where another rank looks.
    ValueError when it does not exist or is damaged, or when a new run would mix its checkpoints with those of another.
    """
    folder = checkpoint_folder(config.output)
    present = list_checkpoints(folder)
    if config.resume == "latest":
        whole, damaged = newest_whole(present, look)
        for path, reason in damaged.items():
            tell(f"{reason}: going on from {whole and whole.name}; it is called {set_aside(path).name} now")
        return whole
    resumed = None
    if config.resume is not None:
        resumed = Path(config.resume).resolve()
        _look_at(resumed, look)
    if present and present[-1].resolve() != resumed and not config.overwrite:
        there = f"{str(folder)!r} already holds {len(present)} checkpoints, the last {present[-1].name}"
        if resumed is None:
            raise ValueError(f'{there}: choose another output, resume = "latest", or overwrite = true')
        raise ValueError(f"{there}: to go on from {resumed.name}, choose another output, or remove those after it")
    return resumed


def newest_whole(present: list[Path], look: bool = True) -> tuple[Path | None, dict[Path, str]]:
    """The newest of some checkpoints that is whole, and what is wrong with those that are newer. ValueError where none
    of them is; None where there are none."""
    damaged: dict[Path, str] = {}
    for path in reversed(present):
        try:
            _look_at(path, look)
        except Damaged as error:
            damaged[path] = str(error)
        else:
            return path, damaged
    if damaged:
        raise ValueError(f"{next(iter(damaged.values()))}; none of the {len(damaged)} checkpoints there is whole")
    return None, {}


def _look_at(path: Path, look: bool) -> None:
    manifest = Manifest.read(path)
    if look:
        manifest.check()
