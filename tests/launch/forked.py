"""`lasp train` whose launcher and ranks are forked from a process that has imported everything: a start takes a second.

What differs from the command is that a rank is no new program; how it is tied, watched and ended is the launcher's.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["tests.launch.forked", "lasp.launch.train", "lasp.train.loop", "lasp.train.sample", "lasp.train.engines.ddp"]
)


class Training:
    """A run of `lasp train` with these arguments, in the background.

    faults: by rank, a line of Python that it executes in the place of the beginning of step `at` (`self` is the
    Trainer), once, in the first attempt only. stderr: a file that receives what it says.
    """

    def __init__(self, folder: Path, arguments: list[str], faults: dict[int, str] | None = None, at: int = 0) -> None:
        self.folder, self.stderr = folder, folder / "stderr"
        told = (str(folder), arguments, faults or {}, at)
        self.process: BaseProcess = _SERVER.Process(target=_launch, args=told)
        self.process.start()
        self.began = time.monotonic()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def ranks(self) -> list[int]:
        """Process ids of its ranks, in their order."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        except FileNotFoundError:
            return []
        return sorted(int(child) for child in children)

    def steps(self) -> int:
        """Steps in its metrics."""
        metrics = self.folder / "run" / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def wait_for_steps(self, steps: int) -> None:
        """Until so many are done, or it has ended."""
        while self.process.is_alive() and self.steps() < steps:
            time.sleep(0.005)

    def end(self, seconds: float) -> int | None:
        """Its exit code; None, after it was killed, where it took longer."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
        return code


def alive(pid: int) -> bool:
    """Whether there is such a process that is more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _launch(folder: str, arguments: list[str], faults: dict[int, str], at: int) -> None:
    """Be the command."""
    os.setsid()
    file = os.open(f"{folder}/stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.environ["TMPDIR"] = folder
    from lasp.launch import ranks
    from lasp.launch.train import main

    class Forked(subprocess.Popen):
        def _execute_child(self, args: Any, *more: Any) -> None:
            self.pid, self._child_created = os.fork(), True
            if self.pid == 0:
                _be_rank([str(word) for word in args[3:]], more[5], faults, at, f"{folder}/faulty")

    ranks.subprocess = type("Forking", (), {"Popen": Forked, "DEVNULL": subprocess.DEVNULL})
    code = main([f"{folder}/tiny.toml", *arguments])
    sys.stdout.flush()
    os._exit(code)


def _be_rank(told: list[str], environment: dict[str, str], faults: dict[int, str], at: int, once: str) -> None:
    """Be a rank, as after exec."""
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(environment)
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # a new program reads it, and rounds accordingly
        rank = int(environment["RANK"])
        if rank in faults:
            _inject(faults[rank], at, f"{once}-{rank}")
        from lasp.launch import rank as entry

        entry.main(*told)
    finally:
        os._exit(99)  # never back into what was forked


def _inject(fault: str, at: int, once: str) -> None:
    from lasp.train.loop import Trainer

    step = Trainer.step

    def faulty(self: Trainer) -> Any:
        if self.steps_done == at and not os.path.exists(once):
            Path(once).touch()
            exec(fault, {"os": os, "self": self})
        return step(self)

    Trainer.step = faulty  # type: ignore[method-assign]
