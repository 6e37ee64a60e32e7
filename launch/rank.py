"""One rank of a command: tied to its launcher, it meets the others, works, and writes down how that ended.

`lasp.launch.ranks` runs this file, with its own process id, the folder where the ranks meet, this rank, the number of
ranks, the module that works and its arguments. Nothing but the standard library is imported before the rank is tied:
importing torch takes seconds, in which the launcher could die.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(parent: str, folder: str, rank: str, size: str, module: str, *arguments: str) -> NoReturn:
    """Be a rank: `module.as_rank(arguments)` is its work."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing yet that a KeyboardInterrupt would tidy up
    tie(int(parent))
    with importing():
        from lasp.launch.cli import fill_descriptors
        from lasp.launch.outcome import Outcome

    fill_descriptors()
    try:
        outcome = Outcome.of(lambda: _work(Path(folder), int(rank), int(size), module, list(arguments)))
    except SystemExit as error:
        outcome = Outcome(1, f"left with exit code {error.code} while others were at work")
    try:
        write_outcome(outcome_file(Path(folder), int(rank)), asdict(outcome))
    except OSError:  # the disk of temporary files is full, maybe that which ended this rank
        outcome.tell(f"rank {rank}: ")
    sys.stdout.flush()
    # After an error the others may be anywhere, and an orderly exit would wait for them, or gloo would abort it.
    os._exit(outcome.code)


def tie(parent: int) -> None:
    """Make this process, a child of `parent`, end when `parent` does, however that ends."""
    if sys.platform == "linux":
        # Sent when the thread ends that started this process: the launcher's, which waits for it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before this process was tied
        os._exit(1)


@contextmanager
def importing() -> Iterator[None]:
    """Around long imports: what they make stays, and Python would look for garbage in all of it again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def outcome_file(folder: Path, rank: int) -> Path:
    """Where a rank writes how it ended."""
    return folder / f"rank-{rank}.json"


def write_outcome(path: Path, outcome: dict[str, Any]) -> None:
    """Write down how this rank ended, and when; the file is whole from the moment it is there."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"time": time.monotonic(), "outcome": outcome}), encoding="utf-8")
    partial.replace(path)


def _follow(parent: int, seconds: float = 1.0) -> None:
    while os.getppid() == parent:
        time.sleep(seconds)
    os._exit(1)


def _work(folder: Path, rank: int, size: int, module: str, arguments: list[str]) -> int:
    import torch.distributed as dist

    from lasp.parallel.group import create_world

    signal.signal(signal.SIGINT, signal.default_int_handler)
    with importing():
        work = import_module(module).as_rank
    create_world(dist.FileStore(str(folder / "store"), size), rank, size)
    return int(work(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
