"""Leaving a process group: gloo's threads have let go of every tensor before the interpreter ends."""

from __future__ import annotations

import ctypes
import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import lasp
from lasp.parallel import group as module

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux tells whether a thread sleeps")


def start(work: Callable[[], object], name: str = "pt_gloo_runloop") -> threading.Thread:
    """A thread of this name at work, once it has begun."""
    begun = threading.Event()

    def run() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
        begun.set()
        work()

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    return thread


def spin(seconds: float) -> None:
    """Keep the interpreter's lock wanted, as a thread does that frees tensors."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


@pytest.mark.parametrize(
    "work",
    [
        lambda: spin(0.3),  # wants the interpreter's lock
        lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 400_000),  # computes without it, and never sleeps
        lambda: [spin(0.1), ctypes.CDLL(None).sched_yield(), spin(0.1)],
    ],
    ids=["python", "native", "both"],
)
def test_a_thread_of_gloo_at_work_is_waited_for(work: Callable[[], object]) -> None:
    done: list[object] = []
    thread = start(lambda: done.append(work()))
    module._wait_for_gloo(seconds=30)
    assert done
    thread.join()


def test_others_and_sleepers_are_not_waited_for() -> None:
    rest = threading.Event()
    threads = [start(rest.wait), start(lambda: spin(3), name="someone_else")]
    time.sleep(0.05)
    begin = time.monotonic()
    module._wait_for_gloo(seconds=30)
    assert threads[1].is_alive()
    assert time.monotonic() - begin < 3
    rest.set()
    for thread in threads:
        thread.join()


def test_the_wait_has_an_end() -> None:
    thread = start(lambda: spin(1))
    module._wait_for_gloo(seconds=0.1)
    assert thread.is_alive()
    thread.join()


def test_shutdown_leaves_the_group_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(module, "_wait_for_gloo", lambda: waited.append(dist.is_initialized()))
    lasp.init_mesh(device="cpu")
    lasp.shutdown()
    assert waited == [False]
    lasp.shutdown()
    assert waited == [False]
    assert lasp.init_mesh(device="cpu").size() == 1, "it may be joined again"
    lasp.shutdown()


@pytest.mark.parametrize(("sizes", "ranks"), [({"sp": 2}, 2), ({"sp": 4, "dp": 2}, 8), ({"sp": 1, "tp": 3}, 3)])
def test_a_mesh_for_more_ranks_than_one_says_how_they_are_started(sizes: dict[str, int], ranks: int) -> None:
    with pytest.raises(ValueError, match=f"the world has 1: start it with torchrun --nproc-per-node {ranks}$"):
        lasp.init_mesh(**sizes, device="cpu")
    lasp.shutdown()


@pytest.mark.parametrize("device", ["gpu", 2.5, "cuda"])
def test_a_device_that_is_not_there(device: Any) -> None:
    if device == "cuda" and torch.cuda.is_available():
        return
    with pytest.raises(ValueError, match=r"device must be one of torch|there is no GPU here"):
        lasp.init_mesh(device=device)
    lasp.shutdown()


def test_what_is_no_mesh_and_no_process_group() -> None:
    for wrong in (None, "sp", 2):
        with pytest.raises(ValueError, match="mesh must be a DeviceMesh"):
            lasp.SequenceGroup.from_mesh(wrong)
    mesh = lasp.init_mesh(device="cpu")
    with pytest.raises(ValueError, match=r"process_group must be one of torch\.distributed, got DeviceMesh"):
        lasp.SequenceGroup.from_group(mesh)
    lasp.shutdown()
    with pytest.raises(ValueError, match="the process group that the mesh is of is no more"):
        lasp.SequenceGroup.from_mesh(mesh)
