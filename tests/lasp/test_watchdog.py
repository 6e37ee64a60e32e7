"""A watchdog, with ranks that are threads of this process."""

from __future__ import annotations

import faulthandler
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lasp.parallel import collectives
from lasp.parallel.collectives import Message
from lasp.parallel.group import join_world, limit_waits, shutdown
from lasp.train import watchdog
from lasp.train.watchdog import Watchdog, Where, verdict

# What ends a process here ends a thread.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def armed(monkeypatch):
    """What is asked of faulthandler's timer, in the place of that: it would end the tests."""
    asked = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *args, **kwargs: asked.append((args, kwargs)))
    monkeypatch.setattr(watchdog, "limit_waits", lambda timeout: asked.append(timeout.total_seconds()))
    return asked


def watch(ranks: int, monkeypatch, limit: float = 0.4) -> tuple[list[Watchdog], list[str], threading.Event]:
    """Watchdogs of so many ranks; what they end with, and an event that lets them go on after that."""
    store, told, go_on = dist.HashStore(), [], threading.Event()
    monkeypatch.setattr(watchdog, "common_store", lambda name: dist.PrefixStore(name, store))

    def end(line: str) -> None:
        told.append(line)
        go_on.wait()
        raise SystemExit

    dogs = [Watchdog(limit, SimpleNamespace(rank=rank, size=ranks), end) for rank in range(ranks)]
    for dog in dogs:
        dog.__enter__()
    return dogs, told, go_on


def test_a_step_that_does_not_end_ends_every_rank_and_who_is_behind_is_named_once(armed, monkeypatch, capsys):
    dogs, told, go_on = watch(3, monkeypatch)
    began = time.monotonic()
    for rank, dog in enumerate(dogs):
        dog.at("step 7")
        for _ in range(2 if rank != 1 else 1):
            dog._last.count, dog._last.name = dog._last.count + 1, "all_reduce of control"
    while len(told) < 3:
        time.sleep(0.01)
    assert 0.4 < time.monotonic() - began < 1.4
    assert sorted(told)[:2] == ["", ""]
    assert sorted(told)[2] == (
        "step 7 took longer than timeout = 0.4 s: rank 1 is behind: step 7, exchange 1 (all_reduce of control); "
        "rank 0, 2 is at step 7, exchange 2 (all_reduce of control)"
    )
    stderr = capsys.readouterr().err
    assert stderr.count("most recent call first") >= 3
    assert [f"lasp: rank {rank} of 3: step 7, exchange" in stderr for rank in range(3)] == [True] * 3
    assert armed[0] == 60.4
    assert ((pytest.approx(1.5),), {"exit": True, "file": 2}) in armed
    go_on.set()
    for dog in dogs:
        dog._alarm.clear()  # with it, a rank waits for its end
        dog.__exit__(None, None, None)


def test_work_that_goes_on_is_left_alone(armed, monkeypatch):
    dogs, told, _ = watch(1, monkeypatch, limit=0.3)
    with collectives.traffic() as ledger:
        for step in range(8):
            dogs[0].at(f"step {step}")
            collectives.record("all_gather", "forward", 4, 1)
            time.sleep(0.08)
            assert str(dogs[0]._where()) == f"step {step}, exchange 1 (all_gather of forward)"
    dogs[0].__exit__(None, None, None)
    assert not told
    assert len(ledger.records) == 8
    assert not any(thread.is_alive() for thread in dogs[0]._threads)
    assert not collectives._followers


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            {0: Where(3, "step 3", 5, "ring of forward")},
            "rank 1 said nothing (stopped, or in code that does not let Python's threads run); "
            "rank 0 is at step 3, exchange 5 (ring of forward)",
        ),
        (
            {0: Where(3, "step 3", 0, "none"), 1: Where(2, "step 2", 9, "ring of forward")},
            "rank 1 is behind: step 2, exchange 9 (ring of forward); rank 0 is at step 3, before any exchange",
        ),
        (
            {0: Where(3, "step 3", 5, "ring of forward"), 1: Where(3, "step 3", 5, "barrier of control")},
            "rank 0 is at step 3, exchange 5 (ring of forward); rank 1 is at step 3, exchange 5 (barrier of control)",
        ),
    ],
)
def test_the_verdict_says_who_is_silent_who_is_behind_and_who_is_elsewhere(said, told):
    assert verdict("why", said, 2) == f"why: {told}"


def test_a_store_that_does_not_answer_is_said(armed, monkeypatch):
    """That of a rank 0 which is stopped holds up whoever asks."""
    asked, told = threading.Event(), []
    store = SimpleNamespace(clone=lambda: SimpleNamespace(check=lambda names: asked.wait() and False))
    monkeypatch.setattr(watchdog, "common_store", lambda name: store)

    def end(line: str) -> None:
        told.append(line)
        raise SystemExit

    dog = Watchdog(0.2, SimpleNamespace(rank=1, size=2), end)
    with dog:
        dog.at("step 1")
        dog._threads[0].join()
        dog._alarm.clear()
    assert told == [
        "step 1 took longer than timeout = 0.2 s: the store in which the ranks met does not answer; rank 0 holds it, "
        "or its launcher"
    ]
    asked.set()


def test_messages_between_two_ranks_wait_as_long_as_their_group_is_told_to(monkeypatch):
    """Of itself gloo waits for them as long as the group was made to."""
    waited = []
    works = [SimpleNamespace(wait=lambda *limits: waited.append(limits))]
    monkeypatch.setattr(dist, "irecv", lambda *args, **kwargs: works[0])
    monkeypatch.setattr(dist, "isend", lambda *args, **kwargs: works[0])
    monkeypatch.setattr(dist, "P2POp", lambda *args, **kwargs: SimpleNamespace(tensor=args[1]))
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda operations: works)
    join_world()
    group, one = dist.group.WORLD, torch.ones(1)
    try:
        limit_waits(timedelta(hours=3))
        collectives.send(one, 1, group, 0).wait()
        collectives.receive(one, 1, group, 0).wait()
        collectives.rotate([Message(one, 1, 0)], [], None, one).wait()
        monkeypatch.setattr(dist, "get_rank", lambda group: 0)
        collectives.swap_headers(one, [0, 1], group).wait()
    finally:
        monkeypatch.undo()
        shutdown()
    assert waited == [(timedelta(hours=3),)] * 5


def exchange_late(rank: int, folder: str) -> None:
    """Two messages, each a second after the limit that the group was made with."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=3))
    limit_waits(timedelta(seconds=60))
    for number in range(2):
        time.sleep(4 * rank)
        arriving, outgoing = torch.zeros(1), [Message(torch.ones(1), 1 - rank, 0)]
        if number:
            collectives.rotate(outgoing, [Message(arriving, 1 - rank, 0)], None, arriving).wait()
        else:
            arriving = collectives.swap_headers(torch.ones(1), range(2), dist.group.WORLD).wait()[1 - rank]
        assert arriving.item() == 1
    shutdown()


@pytest.mark.slow
def test_two_ranks_wait_for_each_other_longer_than_their_group_was_made_to(tmp_path):
    torch.multiprocessing.spawn(exchange_late, (str(tmp_path),), nprocs=2)
