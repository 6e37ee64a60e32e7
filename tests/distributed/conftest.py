"""One mpirun of four ranks runs all of these tests; smaller worlds are subgroups of it.

MPI only tells each rank who it is and where to meet; the tests themselves talk through gloo.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.distributed.device_mesh import DeviceMesh

import lasp

WORLD = 4


def pytest_configure(config: pytest.Config) -> None:
    """Refuse what would stop one rank alone: the others wait for it until they time out."""
    if config.getoption("maxfail") and MPI.COMM_WORLD.size > 1:
        raise pytest.UsageError("-x and --maxfail stop one rank while the others wait for it: leave them out")


@pytest.fixture(scope="session")
def world() -> Iterator[MPI.Comm]:
    """All four ranks, in a gloo process group."""
    comm = MPI.COMM_WORLD
    assert comm.size == WORLD, f"run with: mpirun -n {WORLD} python -m pytest --with-mpi (got {comm.size} ranks)"
    torch.set_num_threads(1)
    folder = comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=comm.rank, world_size=WORLD, timeout=timedelta(seconds=40)
    )
    yield comm
    dist.barrier()
    dist.destroy_process_group()


def meet(comm: MPI.Comm) -> None:
    """Wait until all ranks are here. MPI's own waits poll, and take the cores from ranks that still compute."""
    request, pause = comm.Ibarrier(), 1e-4
    while not request.Test():
        time.sleep(pause)
        pause = min(2 * pause, 1e-2)


@pytest.fixture(autouse=True)
def together(world: MPI.Comm) -> Iterator[None]:
    """No rank begins a test before the others have left the last one."""
    yield
    meet(world)


@pytest.fixture(scope="session")
def once(world: MPI.Comm) -> Callable[..., Any]:
    """`once(run, *args)` is what `run(*args)` gives, by rank 0 for all of them, who all call it."""

    def shared(run: Callable[..., Any], *args: Any) -> Any:
        result, error = None, None
        if world.rank == 0:
            try:
                result = run(*args)
            except Exception as raised:
                error = raised
        meet(world)
        result, error = world.bcast((result, error))
        if error is not None:
            raise error
        return result

    return shared


@pytest.fixture(scope="session")
def subgroups(world: MPI.Comm) -> dict[int, dist.ProcessGroup | None]:
    """Process groups of the first 1, 2, 3 and 4 ranks."""
    return {size: dist.new_group(list(range(size))) for size in (1, 2, 3, WORLD)}


@pytest.fixture(scope="session")
def group_of(world: MPI.Comm, subgroups: dict[int, dist.ProcessGroup]) -> Callable[..., lasp.SequenceGroup | None]:
    """Make a SequenceGroup of the first `size` ranks; None on the ranks outside it."""

    def make(size: int, layout: str = "contiguous", checks: bool = True, heads: int = 1) -> lasp.SequenceGroup | None:
        if world.rank >= size:
            return None
        return lasp.SequenceGroup.from_group(subgroups[size], layout=layout, heads=heads, checks=checks)

    return make


@pytest.fixture(scope="session")
def mesh_of(world: MPI.Comm) -> Callable[..., DeviceMesh]:
    """The mesh of `lasp.init_mesh` with these sizes, of which all tests share one."""
    return cache(lambda **sizes: lasp.init_mesh(**sizes, device="cpu"))


@pytest.fixture
def own_groups(world: MPI.Comm) -> Iterator[None]:
    """The process groups that this test makes end with it: each has a thread that wakes a hundred times a second."""
    registered = dist.distributed_c10d._world.pg_map
    before = set(registered)
    yield
    meet(world)
    for group in [group for group in registered if group not in before]:
        dist.destroy_process_group(group)


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """One rank's dots are enough; failures are told by every rank that has them."""
    if report.passed and report.when == "call" and MPI.COMM_WORLD.rank > 0:
        return "passed", "", ""
    return None
