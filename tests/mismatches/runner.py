"""Runs mistakes of one rank on fresh ranks and says what comes of each.

`python -m tests.mismatches [WORDS of a case's name ...]` prints a line per case and the table of docs/reliability.md.

Importing takes ten seconds and a case a tenth of one: so this process imports, and forks the ranks of every case. They
meet in a file, talk over the loopback, and report through pipes.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import lasp

TIMEOUT = 8.0  # of the process group, in seconds; and how long a rank may take before it counts as waiting
GRACE = 3.0  # within which a rank must end after those that were done before it have left

OUTCOMES = ("refused", "raised", "values", "silent", "abort", "hang", "wait", "harmless")


class Case(NamedTuple):
    """A call in which the last rank does something else than the others.

    run: called on every rank with a group of all, and whether this is the rank that is wrong. expects: "mistake", or
    "harmless" where it is none, or "values" where only other values on a rank make it one.
    """

    api: str
    name: str
    run: Callable[[lasp.SequenceGroup, bool], Any]
    expects: str = "mistake"
    ranks: int = 2
    checks: bool = True


class Report(NamedTuple):
    """What became of one rank: what it raised ("" if nothing), the message, and after how many seconds."""

    error: str
    message: str
    seconds: float


def try_case(case: Case) -> tuple[str, list[Report | None]]:
    """The outcome of a case, one of OUTCOMES, and the ranks' reports; None of a rank that was killed or aborted."""
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(case, rank, f"file://{folder}/store") for rank in range(case.ranks)]
        reports: dict[int, Report] = {}
        deadline = time.monotonic() + TIMEOUT + 10  # they start, and the last seconds count
        _collect(children, reports, deadline)
        late = len(reports) < case.ranks
        first = dict(reports)
        for rank in first:  # those that are done leave, as at the end of a script
            os.kill(children[rank][0], signal.SIGKILL)
        _collect(children, reports, time.monotonic() + GRACE)
        statuses = [_reap(pid) for pid, _ in children]
        for _, read in children:
            os.close(read)
    aborted = any(os.WIFSIGNALED(s) and os.WTERMSIG(s) in (signal.SIGABRT, signal.SIGSEGV) for s in statuses)
    return _outcome(case, first, late, aborted), [reports.get(rank) for rank in range(case.ranks)]


def _outcome(case: Case, reports: dict[int, Report], late: bool, aborted: bool) -> str:
    waited = late or any("Timed out" in r.message or "timed out" in r.message for r in reports.values())
    if aborted:
        return "abort"
    if waited:
        return "wait" if any(r.error and "imed out" not in r.message for r in reports.values()) else "hang"
    errors = [r.error for r in reports.values()]
    if all(errors):
        # A connection that broke is the death of another rank, or of its part of the exchange.
        return "refused" if all(error == "ValueError" for error in errors) else "raised"
    if any(errors):
        return "wait"
    return {"mistake": "silent"}.get(case.expects, case.expects)


def _fork(case: Case, rank: int, store: str) -> tuple[int, int]:
    """The process of a rank, and the end of the pipe that it reports through."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        warnings.simplefilter("ignore")
        os.write(write, pickle.dumps(_report(case, rank, store)))
        os.close(write)
        time.sleep(60)  # a process that lives on, until it is told to leave
    finally:
        os._exit(1)


def _report(case: Case, rank: int, store: str) -> Report:
    """Run the case on one rank."""
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=case.ranks, timeout=timedelta(seconds=TIMEOUT)
    )
    group = lasp.SequenceGroup.from_group(checks=case.checks)
    start = time.monotonic()
    try:
        case.run(group, rank == case.ranks - 1)
        lasp.shutdown()  # the last line of a script
    except BaseException as error:
        name = "ValueError" if isinstance(error, ValueError) else type(error).__name__
        return Report(name, str(error)[:300], time.monotonic() - start)
    return Report("", "", time.monotonic() - start)


def _collect(children: list[tuple[int, int]], reports: dict[int, Report], deadline: float) -> None:
    """Read reports until all have come, or the deadline. A pipe that ends without one is of a rank that died."""
    waiting = {read: rank for rank, (_, read) in enumerate(children) if rank not in reports}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for read in select.select(list(waiting), [], [], left)[0]:
            rank, sent = waiting.pop(read), os.read(read, 65536)
            if sent:
                reports[rank] = pickle.loads(sent)


def _reap(pid: int) -> int:
    """Kill a rank that is still there; its status."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
        return status
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def tabulate(found: Iterable[tuple[Case, str]]) -> str:
    """The table of docs/reliability.md, by API."""
    rows: dict[str, Counter[str]] = {}
    for case, outcome in found:
        rows.setdefault(case.api, Counter())[outcome] += 1
    total = sum(rows.values(), Counter())
    lines = ["| API | cases | " + " | ".join(OUTCOMES) + " |", "|---|" + "---|" * (len(OUTCOMES) + 1)]
    for api, counts in [*rows.items(), ("all", total)]:
        numbers = [str(counts[outcome] or "") for outcome in OUTCOMES]
        lines.append(f"| {api} | {sum(counts.values())} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    """Try the cases whose API and name contain all of the words."""
    from tests.mismatches.cases import CASES

    found = []
    for case in CASES:
        if all(word in f"{case.api}: {case.name}" for word in words):
            outcome, reports = try_case(case)
            found.append((case, outcome))
            told = " | ".join(
                "-" if r is None else f"{r.error or 'ok'} {r.message[:110]!r} {r.seconds:.1f}s" for r in reports
            )
            sys.stdout.write(f"{outcome:9} {case.expects:9} {case.api}: {case.name}: {told}\n")
            sys.stdout.flush()
    sys.stdout.write(tabulate(found) + "\n")
