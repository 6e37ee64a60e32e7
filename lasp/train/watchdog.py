"""A watchdog: where the work of a rank does not go on, it says where every rank is, and ends this one.

It looks from a thread of its own, so that a rank which waits for another is seen too. One whose interpreter is held (by
a library that does not let Python's threads run) is seen by faulthandler, whose timer needs no interpreter.
"""

import faulthandler
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

from lasp.parallel import collectives
from lasp.parallel.group import SequenceGroup, common_store, limit_waits
from lasp.parallel.parameters import some

_SPARE = 60.0
"""Seconds by which the libraries' own timeouts are longer: the watchdog has more to say."""


class Where(NamedTuple):
    """How far a rank is: the pieces of work begun, the last of them, and the exchanges begun in it, with the last."""

    begun: int
    work: str
    exchanges: int
    last: str

    def __str__(self) -> str:
        last = f"exchange {self.exchanges} ({self.last})" if self.exchanges else "before any exchange"
        return f"{self.work}, {last}"


class Watchdog:
    """Looks whether the work that `at` names is followed by other work within `limit` seconds.

    Where it is not, on any rank, every rank prints the stacks of its threads on stderr, says in the store where the
    ranks met how far it is, and calls `end` with one line on who is behind; "" on all but the first rank that spoke.
    `end` must not return. A rank whose interpreter is held prints its stacks and ends with code 1 a little later.
    """

    def __init__(self, limit: float, ranks: SequenceGroup, end: Callable[[str], None]) -> None:
        self.limit, self.ranks, self.end = limit, ranks, end
        self._pause = min(1.0, limit / 20)
        self._hearing = 2 * self._pause + 0.5  # seconds in which all have heard, and said where they are
        self._began, self._begun, self._work = float("inf"), 0, ""
        self._last = collectives.Last()
        self._left, self._alarm, self._all_said = threading.Event(), threading.Event(), threading.Event()
        self._said: dict[int, Where] = {}
        self._store: Any = None
        self._why, self._heard = "", False
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._watch, self._talk)]

    def at(self, work: str) -> None:
        """Say what this rank is at from now on."""
        self._last.count, self._last.name = 0, "none"
        self._work, self._begun = work, self._begun + 1
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        limit_waits(timedelta(seconds=self.limit + _SPARE))
        self._following = collectives.following(self._last)
        self._following.__enter__()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._alarm.is_set():
            self._left.wait()  # the error is that another rank has ended; this one's thread ends it too
        self._left.set()
        self._following.__exit__(None, None, None)
        for thread in self._threads:
            thread.join(2 * self._pause)  # one may wait for a store that is gone

    def _watch(self) -> None:
        while not self._left.wait(self._pause):
            if not self._alarm.is_set():
                faulthandler.dump_traceback_later(self.limit + 2 * self._hearing + self._pause, exit=True, file=2)
            if time.monotonic() - self._began > self.limit:
                self._why = f"{self._work} took longer than timeout = {self.limit:g} s"
                self._alarm.set()
            if self._alarm.is_set():
                print_stacks(f"rank {self.ranks.rank} of {self.ranks.size}: {self._where()}{_recorded()}")
                self._all_said.wait(self._hearing)
                self.end(self._verdict())
        faulthandler.cancel_dump_traceback_later()

    def _verdict(self) -> str:
        said = dict(self._said)
        if not self._heard:
            return f"{self._why}: the store in which the ranks met does not answer; rank 0 holds it, or its launcher"
        return verdict(self._why, said, self.ranks.size) if min(said) == self.ranks.rank and self._tells() else ""

    def _tells(self) -> bool:
        """Whether it is for this rank to tell: one that was held up, and goes on now, finds that another one has."""
        own = str(self.ranks.rank)
        try:
            return bool(self._store.compare_set("told by", "", own).decode() == own)
        except RuntimeError:
            return True  # the store has gone with the rank that held it

    def _where(self) -> Where:
        return Where(self._begun, self._work, self._last.count, self._last.name)

    def _talk(self) -> None:
        """Hear of an alarm, or tell of it; then tell where this rank is, and read where the others are."""
        self._said[self.ranks.rank] = self._where()
        try:
            # A store of its own: the main thread may be in another.
            self._store = store = common_store("watchdog").clone()  # type: ignore[attr-defined]
            while not self._alarm.is_set() and not store.check(["why"]):
                if self._left.wait(self._pause):
                    return
            self._said[self.ranks.rank] = self._where()
            self._why = store.compare_set("why", "", self._why).decode()
            self._alarm.set()
            store.set(f"rank {self.ranks.rank}", json.dumps(self._where()))
            self._heard = True
            while missing := [rank for rank in range(self.ranks.size) if rank not in self._said]:
                for rank in missing:
                    if store.check([f"rank {rank}"]):
                        self._said[rank] = Where(*json.loads(store.get(f"rank {rank}")))
                if self._left.wait(self._pause / 4):
                    return
            self._all_said.set()
        except RuntimeError:
            return  # the store is gone with the rank that held it: at the end of a run, or of that rank


def verdict(why: str, said: dict[int, Where], size: int) -> str:
    """One line on why the run ends: which ranks said nothing, which are behind, and where the others are."""
    silent = [str(rank) for rank in range(size) if rank not in said]
    furthest = max(said.values(), key=lambda where: (where.begun, where.exchanges))
    behind = {rank: where for rank, where in said.items() if where[::2] < furthest[::2]}
    parts = []
    if silent:
        parts.append(f"rank {some(silent)} said nothing (stopped, or in code that does not let Python's threads run)")
    if behind:
        slowest = sorted(behind, key=lambda rank: (behind[rank][::2], rank))
        parts.append(f"rank {some(map(str, slowest))} is behind: {behind[slowest[0]]}")
    others: dict[Where, list[str]] = {}
    for rank, where in said.items():
        if rank not in behind:
            others.setdefault(where, []).append(str(rank))
    parts += [f"rank {some(ranks)} is at {where}" for where, ranks in others.items()]
    return f"{why}: {'; '.join(parts)}"


def print_stacks(title: str) -> None:
    """Print the stacks of all threads on stderr, in one piece."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        sys.stderr.write(f"lasp: {title}\n{file.read()}")
        sys.stderr.flush()


def _recorded() -> str:
    """The last entry of torch's flight recorder, where that is on (TORCH_FR_BUFFER_SIZE)."""
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    entries = json.loads(dump()).get("entries") if dump is not None else None
    if not entries:
        return ""
    name, number = (entries[-1].get(key) for key in ("profiling_name", "collective_seq_id"))
    return f"; the flight recorder's last is {name}, number {number}"
