"""Files of a run: what is read as one is one, what is written is whole, and JSON that says what was written."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO)
"""Errors that say that there is no such file; others say that it cannot be read, or not now."""


def regular(path: str, flags: int) -> int:
    """An opener for `open`: OSError (ENXIO) for what is no file. A FIFO would wait, a device may have no end."""
    file = os.open(path, flags | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.ENXIO, "it is no file", path)
    return file


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` when the block ends; nothing is left where that fails.
    OSErrors of the block name it."""
    partial = path.with_name(f".{path.name}")
    partial.unlink(missing_ok=True)  # whatever it is
    try:
        yield partial
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # of writing, which knows no name
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a JSON file says, with a checksum of that."""
    return {**content, "sha256": _checksum(content)}


def unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """What was sealed. ValueError where that is not what the file says."""
    rest = {name: value for name, value in content.items() if name != "sha256"}
    if content.get("sha256") != _checksum(rest):
        raise ValueError("its SHA-256 is not what was written")
    return rest


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
