"""log.txt: plain lines about a run, and the warnings of all of its ranks."""

import logging
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path

from lasp.train.files import regular

Say = Callable[[str], None]


@contextmanager
def logged(path: Path, rank: int) -> Iterator[Say]:
    """Append to a log while the block runs: what is said, with its time, and warnings, those of ranks other than 0 with
    rank and host. Warnings go to stderr as well, as before."""
    handler, root = _Lines(path, rank), logging.getLogger()
    before = list(root.handlers)
    if not before and logging.lastResort is not None:  # which is silent where there is another handler
        root.addHandler(logging.lastResort)
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield handler.say
    finally:
        logging.captureWarnings(False)
        for added in (one for one in list(root.handlers) if one not in before):
            root.removeHandler(added)
        handler.close()


class _Lines(logging.FileHandler):
    """A line per message, warnings and worse. A disk that is full, or a path that is no file, ends no run."""

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        self.setLevel(logging.WARNING)
        self._who = "" if rank == 0 else f"rank {rank} on {socket.gethostname()}: "
        self._complained = False

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        text = " ".join(record.getMessage().split())
        return f"{logging.Formatter().formatTime(record)} {self._who}{level}{text}"

    def say(self, line: str) -> None:
        """Write a line of our own."""
        self.handle(logging.LogRecord("lasp", logging.INFO, "", 0, line, None, None))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # of opening it
            self.handleError(record)

    def close(self) -> None:
        with suppress(OSError):  # what could not be written was told
            super().close()

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding=self.encoding, errors=self.errors, opener=regular)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._complained:
            self._complained = True
            sys.stderr.write(f"lasp: warning: cannot write {self.baseFilename!r}: {sys.exception()}\n")
