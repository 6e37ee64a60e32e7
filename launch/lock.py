"""A folder that one run has to itself."""

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lasp.train.files import regular

NAME = ".lock"
"""The file in the folder. It stays there: who removed it could leave two holders of two files."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made where it does not exist; ValueError, naming the holder, where another run does.

    The lock is flock(2)'s: it goes with the process that holds it, however that ends, so there are no stale ones. NFS
    passes it on to its server (mount option local_lock=none, the default); file systems that know no locks get a
    warning instead.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # `Run.prepare`, which makes it too, says why it cannot be
        yield
        return
    try:
        file = regular(str(folder / NAME), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        _take(file, folder)
        yield
    finally:
        os.close(file)


def holder(folder: Path) -> str | None:
    """Which process holds a folder, on which host; None where no run does."""
    try:
        file = os.open(folder / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _named(file)
    except OSError:
        return None  # a file system without locks
    finally:
        os.close(file)
    return None


def _named(file: int) -> str:
    return os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"


def _take(file: int, folder: Path) -> None:
    try:
        _lock(file)
    except BlockingIOError as error:
        told = f"{str(folder)!r} is in use by {_named(file)}"
        raise ValueError(f"{told}: one output folder is for one run at a time") from error
    except OSError as error:
        told = f"lasp: warning: no lock on {str(folder)!r} ({error.strerror}): see that no other run writes there"
        print(told, file=sys.stderr, flush=True)
        return
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> ValueError:
    return ValueError(f"cannot write to the output folder: {str(folder / NAME)!r}: {error.strerror}")


def _lock(file: int, tries: int = 3) -> None:
    """Lock for this process alone. `holder` looks for a moment, which is no run: BlockingIOError for more than that."""
    for left in reversed(range(tries)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not left:
                raise
            time.sleep(0.1)
