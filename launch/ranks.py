"""The ranks of one machine: started, watched and ended together.

They meet in a file of a private folder, and gloo connects them over the loopback: nothing listens for anyone else.
Several machines have `lasp launch`, see docs/cluster.md.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lasp.launch import rank as entry
from lasp.launch.cli import STUCK, USER_ERROR, print_error
from lasp.launch.outcome import Outcome

SETTLE = 1.0
"""Seconds that the other ranks have to end by themselves when one has failed."""

GRACE = 10.0
"""Seconds that ranks have to end when they were sent a signal."""

FAREWELL = 3.0
"""Seconds that they have when another one has failed: they wait for it, and would not come to their end."""

_POLL = 0.01
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def loopback() -> dict[str, str]:
    """Environment of a process that speaks with others of this machine only, whatever the host's name resolves to."""
    interface = "lo" if sys.platform == "linux" else "lo0"
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}


def run_ranks(module: str, arguments: list[str], size: int, patience: float | None = None) -> int:
    """Run `module.as_rank(arguments)` on `size` processes of this machine and wait for them.

    The cores are shared out among the ranks, unless OMP_NUM_THREADS says otherwise. Returns the largest code that a
    rank returned where all ran to their end. Otherwise one line on stderr names the rank that failed first and says
    why, and the code is 2 for a user error, 70 where a watchdog ended the rank, which has said why, 1 for anything
    else; 128 + n when this process received signal n. patience: seconds that ranks have to come to their end after a
    signal, where none of them fails; by default `GRACE`.
    """
    with tempfile.TemporaryDirectory(prefix="lasp-") as folder, _signals() as received:
        ranks: list[_Rank] = []
        try:
            for place in range(size):
                ranks.append(_Rank.start(module, arguments, place, size, Path(folder)))
            failed = _watch(ranks, received, patience)
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.wait()
    if received and any(rank.failed() for rank in ranks):
        print_error(f"stopped by {signal.Signals(received[0]).name}")
        return 128 + received[0]
    return _tell(failed, size) if failed else max(rank.process.returncode for rank in ranks)


@dataclass
class _Rank:
    """A process, and what is known of its end."""

    rank: int
    process: subprocess.Popen
    folder: Path
    alive: float = 0.0
    """When it was last seen at work; when it wrote down its outcome, if it did."""

    outcome: Outcome | None = None
    """What it wrote down; None where it works still, or left without a word."""

    @classmethod
    def start(cls, module: str, arguments: list[str], rank: int, size: int, folder: Path) -> "_Rank":
        command = f"import runpy; runpy.run_path({entry.__file__!r}, run_name='__main__')"  # leaves sys.path as it is
        told = [str(value) for value in (os.getpid(), folder, rank, size, module)]
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        process = subprocess.Popen(
            [sys.executable, "-c", command, *told, *arguments],
            env={"OMP_NUM_THREADS": str(max(1, cores() // size)), **os.environ, **loopback()}
            | {name: str(value) for name, value in places.items()},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # what a terminal sends comes from the launcher alone, and once
        )
        return cls(rank, process, folder, time.monotonic())

    def look(self) -> bool:
        """Whether it still works; notes when, and reads what it left."""
        now = time.monotonic()
        if self.process.poll() is None:
            self.alive = now
            return True
        written = entry.outcome_file(self.folder, self.rank)
        if self.outcome is None and written.exists():
            told = json.loads(written.read_text(encoding="utf-8"))
            self.alive, self.outcome = told["time"], Outcome(**told["outcome"])
        return False

    def failed(self) -> bool:
        """Whether it is gone and had not come to its end."""
        return self.process.returncode is not None and (self.outcome is None or bool(self.outcome.message))

    def last_words(self) -> Outcome:
        """Its outcome, or what can be said of one that left without a word."""
        code = self.process.returncode
        if self.outcome is not None:
            return self.outcome
        if code == STUCK:
            return Outcome(STUCK)
        if code < 0:
            return Outcome(1, f"killed by {_called(-code)}")
        return Outcome(1, f"left with exit code {code} while others were at work, without a word")


def _called(number: int) -> str:
    """A signal's name; those of real time have only numbers."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list of the signals that arrive and are to be passed on. Under nohup SIGHUP stays ignored."""
    received: list[int] = []
    hung_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    heard = [number for number in _PASSED_ON if hung_up or number != signal.SIGHUP]

    def hear(number: int, _: object) -> None:
        if number != signal.SIGUSR1 or not received:  # schedulers send that one more than once
            received.append(number)

    before = {number: signal.signal(number, hear) for number in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(ranks: list[_Rank], received: list[int], patience: float | None) -> list[_Rank]:
    """Wait until all ranks are gone. Returns those that failed, but for those that were made to end."""
    while _working(ranks) and not received and not any(rank.failed() for rank in ranks):
        time.sleep(_POLL)
    if not received:
        _wait(ranks, SETTLE, received)
    failed = [rank for rank in ranks if rank.failed()]
    if not received and all(rank.last_words().lost_peer for rank in failed):
        _wait(ranks, GRACE, received)  # whom they lost takes its time to end
        failed = [rank for rank in ranks if rank.failed()]
    for rank in _working(ranks):
        rank.process.send_signal(received[0] if received else signal.SIGTERM)
    known = len(received)
    if received and patience is not None:
        _wait(ranks, patience, received, until_failure=True)
    if len(received) == known:
        _wait(ranks, GRACE if received else FAREWELL, received)
    return failed


def _wait(ranks: list[_Rank], seconds: float, received: list[int], until_failure: bool = False) -> None:
    """Wait until all ranks are gone, no longer than some time, until a further signal arrives, or until one failed."""
    known, until = len(received), time.monotonic() + seconds
    while _working(ranks) and len(received) == known and time.monotonic() < until:
        if until_failure and any(rank.failed() for rank in ranks):
            break
        time.sleep(_POLL)


def _working(ranks: list[_Rank]) -> list[_Rank]:
    return [rank for rank in ranks if rank.look()]


def _tell(failed: list[_Rank], size: int) -> int:
    """One line on the rank that failed first; returns the exit code."""
    # Whoever lost a peer is not the cause, and a watchdog has told what is. One that left without a word did so after
    # it was last seen, and the others notice only then.
    first = min(failed, key=lambda rank: (rank.last_words().lost_peer, rank.last_words().code != STUCK, rank.alive))
    words = first.last_words()
    alike = len(failed) == size and all(rank.last_words().message == words.message for rank in failed)
    words.tell("" if alike else f"rank {first.rank}: ")
    return words.code if words.code in (USER_ERROR, STUCK) else 1


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
