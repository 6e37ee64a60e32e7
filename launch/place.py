"""Where this process stands among the ranks that somebody started, as the environment tells: torchrun, srun, mpirun.

The only file that knows these variables. What is read becomes the variables of torch, which torch and its peers (device
meshes, DeepSpeed) understand, and a process group.
"""

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from zlib import crc32

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from lasp.launch.attempt import own_store
from lasp.launch.cli import SAVED, USER_ERROR, fill_descriptors
from lasp.launch.outcome import Failure, Outcome
from lasp.launch.rank import tie
from lasp.launch.ranks import loopback
from lasp.parallel.group import create_world

JOIN = 600.0
"""Seconds in which all ranks have to meet."""

RESOLVE = 60.0
"""Seconds in which the name of rank 0's host has to get an address: those of containers come late."""

LOOPBACK = "127.0.0.1"
Look = Callable[["Place", dist.Store], None]

_PORTS = range(20_000, 32_000)  # below those that systems hand out


@dataclass(frozen=True)
class Place:
    """A rank of several. address and port: where rank 0 waits for the others."""

    rank: int
    size: int
    local_rank: int | None
    local_size: int | None
    address: str
    port: int
    elastic: bool = False
    """Whether torchrun's agent, which has a store of its own, brings the ranks together."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"the environment says rank {self.rank} of {self.size} ranks, which cannot be")

    @staticmethod
    def read(told: Mapping[str, str]) -> "Place | None":
        """The place that some environment tells; None for a process on its own.

        One task of srun or mpirun is on its own as well, and a batch script of Slurm, which is no task. ValueError for
        what is no number, or not enough.
        """
        place = _torch(told) or _open_mpi(told) or _slurm(told) or _hydra(told)
        if place is None and "RANK" in told and "WORLD_SIZE" not in told:
            raise ValueError(f"RANK={told['RANK']!r} is set, but WORLD_SIZE not: of how many ranks?")
        return place

    @property
    def variables(self) -> dict[str, str]:
        """What torch reads; on one machine also what keeps its ranks to it."""
        told = {
            "RANK": self.rank,
            "WORLD_SIZE": self.size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_size,
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
        }
        here = loopback() if self.address == LOOPBACK else {}
        return here | {name: str(value) for name, value in told.items() if value is not None}

    def join(self, look: Look | None = None) -> None:
        """Meet the others. ValueError, on rank 0, where its port is taken or somebody is missing after `JOIN`.

        look: what to do with the store in which they meet, before the process group is made.
        """
        tie(os.getppid())  # torchrun and mpirun, killed, would leave their ranks at work
        os.environ.update(self.variables)
        _check_interface(os.environ.get("GLOO_SOCKET_IFNAME"))
        store = self._meet_again() if self.elastic else self._meet()
        if look is not None:
            look(self, dist.PrefixStore("look", store))
        create_world(store, self.rank, self.size)

    def _meet_again(self) -> dist.Store:
        """In torchrun's store, where ranks may have met before."""
        store = next(iter(rendezvous("env://")))[0]
        try:
            return own_store(store, self.rank, self.size, JOIN)
        except TimeoutError as error:
            raise self._missed(str(error)) from error

    def _missed(self, missing: str) -> Exception:
        where = f"{self.address}:{self.port}"
        if self.rank:
            return Failure(f"waited at {where}, and rank 0 gave up")
        return ValueError(f"of {self.size} ranks, {missing} did not come to {where} in {JOIN:g} s")

    def _meet(self) -> dist.Store:
        if self.size == 1:
            return dist.HashStore()
        where = f"{self.address}:{self.port}"
        _resolve(self.address)
        try:
            store = dist.TCPStore(
                self.address, self.port, self.size, self.rank == 0, timedelta(seconds=JOIN), wait_for_workers=False
            )
        except dist.DistError as error:
            if self.rank == 0:
                told = f"cannot listen at {where}, which MASTER_ADDR and MASTER_PORT may change"
                raise ValueError(f"{told}: {_first_line(error)}") from error
            raise Failure(f"there is no rank 0 at {where}: {_first_line(error)}") from error
        keys = [f"here/{rank}" for rank in range(self.size)]
        try:
            store.set(keys[self.rank], socket.gethostname())
            store.wait(keys, timedelta(seconds=JOIN))
        except dist.DistError as error:
            missing = (
                "" if self.rank else ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key]))
            )
            raise self._missed(missing) from error
        return store


def run_command(alone: Callable[[], int], as_rank: Callable[[], int], look: Look | None = None) -> int:
    """Do a command's work as the rank that somebody made of this process, or on its own; returns its exit code.

    look: as in `Place.join`.
    """
    fill_descriptors()
    try:
        place = Place.read(os.environ)
    except ValueError as error:
        return Outcome(USER_ERROR, str(error)).tell()
    if place is None:
        return Outcome.of(alone).tell()

    def work() -> int:
        place.join(look)
        return as_rank()

    # What all ranks say alike is said once per node: their logs may be files of their own.
    first = place.local_rank == 0 if place.local_rank is not None else place.rank == 0
    outcome = Outcome.of(work)
    if outcome.code == SAVED:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # schedulers send it more than once
    return outcome.tell_as(place.rank, speaks=first)


def _check_interface(name: str | None) -> None:
    """ValueError for a network interface that this machine has not: gloo's own error looks like that of a lost rank."""
    known = [interface for _, interface in socket.if_nameindex()]
    if name and (unknown := sorted(set(name.split(",")) - set(known))):
        raise ValueError(f"GLOO_SOCKET_IFNAME: this machine has no interface {unknown[0]!r}, but {', '.join(known)}")


def _resolve(address: str, seconds: float = RESOLVE) -> None:
    """Wait until a name has an address, and say so. ValueError where it has none in time."""
    until, told = time.monotonic() + seconds, False
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > until:
                raise ValueError(f"MASTER_ADDR={address!r} has no address here: {error}") from error
        if not told:
            print(
                f"lasp: waiting for MASTER_ADDR={address!r}, which has no address here yet", file=sys.stderr, flush=True
            )
        told = True
        time.sleep(1)


def _torch(told: Mapping[str, str]) -> Place | None:
    """torchrun, DeepSpeed's launcher, or a person."""
    if "RANK" not in told or "WORLD_SIZE" not in told:
        return None
    rank, size = _integer(told, "RANK"), _integer(told, "WORLD_SIZE")
    if size > 1 and (missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in told]):
        raise ValueError(f"RANK and WORLD_SIZE are set, but {' and '.join(missing)} not: where do the ranks meet?")
    local_rank, local_size = _optional(told, "LOCAL_RANK"), _optional(told, "LOCAL_WORLD_SIZE")
    return Place(rank, size, local_rank, local_size, *_master(told, LOOPBACK, ""), "TORCHELASTIC_RUN_ID" in told)


def _open_mpi(told: Mapping[str, str]) -> Place | None:
    """mpirun of Open MPI 4 and 5. Which host rank 0 is on, it tells nobody."""
    return _mpi(told, *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))


def _hydra(told: Mapping[str, str]) -> Place | None:
    """mpirun and mpiexec of MPICH and of Intel MPI."""
    return _mpi(told, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def _mpi(told: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str) -> Place | None:
    """The place that variables of these names tell."""
    if rank not in told or _integer(told, size) == 1:
        return None
    ranks, here = _integer(told, size), _integer(told, local_size)
    nodes = hosts(told.get("SLURM_JOB_NODELIST", ""))
    first = LOOPBACK if here == ranks else nodes[0] if nodes else None
    if first is None and "MASTER_ADDR" not in told:
        raise ValueError(
            f"mpirun started {ranks} ranks on several machines and does not say where rank 0 is: give all of them its "
            "host as MASTER_ADDR, as in `mpirun -x MASTER_ADDR=first-host` (Open MPI) or `-genv MASTER_ADDR first-host`"
        )
    jobs = ("PMIX_NAMESPACE", "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
    job = next((told[name] for name in jobs if name in told), "")
    return Place(_integer(told, rank), ranks, _integer(told, local_rank), here, *_master(told, first or "", job))


def _slurm(told: Mapping[str, str]) -> Place | None:
    """A task of srun. A batch script has SLURM_PROCID and SLURM_NTASKS as well, but no step."""
    step = any(name in told for name in ("SLURM_STEP_ID", "SLURM_LAUNCH_NODE_IPADDR")) or "SLURM_JOB_ID" not in told
    sizes = [name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if name in told]
    if "SLURM_PROCID" not in told or not step or not sizes or _integer(told, sizes[0]) == 1:
        return None
    size = _integer(told, sizes[0])
    lists = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    nodes = next((found for name in lists if (found := hosts(told.get(name, "")))), [])
    if not nodes and not told.get("SLURM_LAUNCH_NODE_IPADDR") and "MASTER_ADDR" not in told:
        raise ValueError(f"srun started {size} ranks, but SLURM_STEP_NODELIST does not say where: set MASTER_ADDR")
    first = LOOPBACK if len(nodes) == 1 else nodes[0] if nodes else told.get("SLURM_LAUNCH_NODE_IPADDR", "")
    job = f"{told.get('SLURM_JOB_ID', '')}.{told.get('SLURM_STEP_ID', '')}"
    here = size if len(nodes) == 1 else _tasks_here(told)
    rank, local_rank = _integer(told, "SLURM_PROCID"), _integer(told, "SLURM_LOCALID")
    return Place(rank, size, local_rank, here, *_master(told, first, job))


def hosts(nodes: str) -> list[str]:
    """The hosts of Slurm's list of nodes: "gpu[01-03,7],login" is gpu01, gpu02, gpu03, gpu7, login."""
    found = []
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        names = [""]
        for text, numbers in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", name):
            names = [head + tail for head in names for tail in ([text] if text else _numbers(numbers))]
        found += names
    return found


def _numbers(ranges: str) -> list[str]:
    """The numbers of "01-03,7", as wide as they are written."""
    found = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise ValueError(f"Slurm's list of nodes has [{ranges}] in it, which is no list of numbers")
        found += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return found


def _tasks_here(told: Mapping[str, str]) -> int | None:
    """Tasks of srun on this node: place SLURM_NODEID of a list such as "2(x3),1"."""
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    listed = next((told[name] for name in names if name in told), "")
    tasks = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", listed):
        tasks += [int(count)] * int(times or 1)
    node = _optional(told, "SLURM_NODEID")
    return tasks[node] if node is not None and node < len(tasks) else None


def _master(told: Mapping[str, str], address: str, job: str) -> tuple[str, int]:
    """Where rank 0 waits: what MASTER_ADDR and MASTER_PORT say, else at some address, at a port of the job's own."""
    port = _optional(told, "MASTER_PORT")
    if port is None:
        port = _PORTS[crc32(job.encode()) % len(_PORTS)]
    if not 0 < port < 1 << 16:
        raise ValueError(f"MASTER_PORT={port} is no port")
    return told.get("MASTER_ADDR") or address, port


def _optional(told: Mapping[str, str], name: str) -> int | None:
    return _integer(told, name) if name in told else None


def _integer(told: Mapping[str, str], name: str) -> int:
    """A number that must be there; ValueError otherwise."""
    if name not in told:
        raise ValueError(f"the environment of this rank lacks {name}")
    if not told[name].isdecimal():
        raise ValueError(f"{name}={told[name]!r} in the environment is no number")
    return int(told[name])


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
