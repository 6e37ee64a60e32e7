"""Files that a command writes when its work is done: whether they can be, before it begins."""

from __future__ import annotations

import os
from collections.abc import Mapping
from errno import EACCES
from pathlib import Path
from tempfile import TemporaryFile

PICTURES = (".png", ".svg", ".pdf")


def check_outputs(files: Mapping[str, Path | str | None]) -> None:
    """ValueError for the first option whose file cannot be written, or is that of another one. Leaves nothing behind.

    files: by option; None where it is not asked for. What "--plot" names must end in one of PICTURES.
    """
    taken: dict[Path, str] = {}
    for option, given in files.items():
        if given is None:
            continue
        path = Path(given)
        if option == "--plot" and path.suffix not in PICTURES:
            raise ValueError(f"{option} must end in {', '.join(PICTURES)}, got {str(given)!r}")
        if first := taken.get(path.absolute()):
            raise ValueError(f"{first} and {option} are the same file {str(given)!r}")
        taken[path.absolute()] = option
        _check(option, path)


def _check(option: str, path: Path) -> None:
    """A file of no name beside it tells, on any number of ranks at a time."""
    if path.is_dir():
        raise ValueError(f"{option} must be a file, got the folder {str(path)!r}")
    try:
        if not path.exists():
            with TemporaryFile(dir=path.absolute().parent):
                pass
        elif not os.access(path, os.W_OK):
            raise PermissionError(EACCES, os.strerror(EACCES))
    except OSError as error:
        raise ValueError(f"{option} {str(path)!r} cannot be written: {error.strerror}") from error
