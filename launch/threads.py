"""Ranks that are threads of one process and hand tensors to one another in memory: as many as one likes.

    run(64, function)       what a function of its SequenceGroup returns on every rank

What they stand in for is `torch.distributed`, below `parallel/collectives.py`: its ledger and all above are real, the
headers that ranks agree by as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from queue import Empty, Queue
from threading import Lock
from time import monotonic
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

from lasp.parallel import agreement, collectives, group, parameters
from lasp.parallel.agreement import Channel
from lasp.parallel.group import SequenceGroup
from lasp.parallel.layout import Layout

T = TypeVar("T")
SECONDS = 60.0
"""How long a rank waits for another before it gives up."""


class Lost(Exception):
    """A rank waited in vain."""


class Wires:
    """What the ranks hand to one another. sent: messages so far; crossed: bytes that each rank has received."""

    def __init__(self, ranks: int) -> None:
        self.size, self.sent, self.crossed = ranks, 0, [0] * ranks
        self.failed = False
        self._lines: dict[Any, Queue[Any]] = defaultdict(Queue)
        self._rounds: dict[int, dict[int, Tensor]] = defaultdict(dict)
        self._lock = Lock()

    def put(self, source: int, target: int, tag: int, tensor: Tensor) -> None:
        """Send a copy."""
        with self._lock:
            self.sent += 1
            line = self._lines[source, target, tag]
        line.put(tensor.clone())

    def take(self, source: int, target: int, tag: int) -> Tensor:
        """The next message, when it has come."""
        found: Tensor = self._wait((source, target, tag))
        self._count(target, found.nbytes)
        return found

    def meet(self, number: int, rank: int, tensor: Tensor) -> None:
        """Take part in the collective of a running number."""
        with self._lock:
            rows = self._rounds[number]
            rows[rank] = tensor.clone()
            if len(rows) == self.size:
                del self._rounds[number]
                for each in range(self.size):
                    self._lines[number, each].put([rows[i] for i in range(self.size)])

    def met(self, number: int, rank: int) -> list[Tensor]:
        """What all ranks brought to a collective, when they have."""
        rows: list[Tensor] = self._wait((number, rank))
        with self._lock:
            del self._lines[number, rank]
        return rows

    def _wait(self, key: Any) -> Any:
        deadline = monotonic() + SECONDS
        with self._lock:
            line = self._lines[key]
        while not self.failed and monotonic() < deadline:
            try:
                return line.get(timeout=0.5)
            except Empty:
                pass
        raise Lost(f"nothing came on {key}")

    def _count(self, rank: int, size: int) -> None:
        with self._lock:
            self.crossed[rank] += size


@dataclass(eq=False)
class Place:
    """Stands for the process group of one rank."""

    wires: Wires
    rank: int
    numbers: Iterator[int] = field(default_factory=count)
    """Of collectives, which all ranks make in the same order."""

    def _get_backend(self, device: torch.device) -> None:
        """None of torch's, whose patience with messages would have to be asked for."""

    def meet(self, tensor: Tensor) -> Callable[[], list[Tensor]]:
        """Start a collective; what is returned waits for what all ranks bring."""
        number = next(self.numbers)
        self.wires.meet(number, self.rank, tensor)
        return lambda: self.wires.met(number, self.rank)


class Work(NamedTuple):
    """As torch's."""

    wait: Callable[[], object]


def _isend(tensor: Tensor, group: Place, group_dst: int, tag: int = 0) -> Work:
    group.wires.put(group.rank, group_dst, tag, tensor)
    return Work(lambda: None)


def _irecv(tensor: Tensor, group: Place, group_src: int, tag: int = 0) -> Work:
    return Work(lambda: tensor.copy_(group.wires.take(group_src, group.rank, tag)))


class _Operation(NamedTuple):
    """As torch's P2POp."""

    op: Callable[..., Work]
    tensor: Tensor
    group: Place
    group_peer: int
    tag: int


def _batch(operations: Sequence[_Operation]) -> list[Work]:
    return [each.op(each.tensor, each.group, each.group_peer, each.tag) for each in operations]


def _all_gather(output: Tensor, own: Tensor, group: Place, async_op: bool) -> Work:
    rows = group.meet(own)

    def wait() -> None:
        torch.cat(rows(), out=output)
        group.wires._count(group.rank, output.nbytes - own.nbytes)

    return Work(wait)


def _broadcast(tensor: Tensor, group: Place, group_src: int, async_op: bool) -> Work:
    rows = group.meet(tensor)

    def wait() -> None:
        found = rows()
        if group.rank != group_src:
            tensor.copy_(found[group_src])
            group.wires._count(group.rank, tensor.nbytes)

    return Work(wait)


def _all_reduce(tensor: Tensor, group: Place, async_op: bool) -> Work:
    rows = group.meet(tensor)
    return Work(lambda: tensor.copy_(torch.stack(rows()).sum(0)))


def _reduce_scatter(output: Tensor, whole: Tensor, group: Place, async_op: bool) -> Work:
    rows = group.meet(whole)
    return Work(lambda: output.copy_(torch.stack([row.chunk(group.wires.size)[group.rank] for row in rows()]).sum(0)))


DISTRIBUTED = SimpleNamespace(
    get_rank=lambda group: group.rank,
    get_world_size=lambda group: group.wires.size,
    get_backend=lambda group: "gloo",
    get_backend_config=lambda group: "cpu:gloo",
    get_process_group_ranks=lambda group: list(range(group.wires.size)),
    ProcessGroupGloo=torch.distributed.ProcessGroupGloo,
    isend=_isend,
    irecv=_irecv,
    P2POp=lambda op, tensor, group, group_peer, tag: _Operation(op, tensor, group, group_peer, tag),
    batch_isend_irecv=_batch,
    broadcast=_broadcast,
    all_reduce=_all_reduce,
    barrier=lambda group: group.meet(torch.empty(0))(),
)
"""What parallel/ asks of `torch.distributed`."""


@contextmanager
def in_memory() -> Iterator[None]:
    """Let exchanges be those of this file."""
    with ExitStack() as stack:
        for module in (agreement, collectives, group, parameters):
            stack.enter_context(patch.object(module, "dist", DISTRIBUTED))
        for function in (_all_gather, _reduce_scatter):
            stack.enter_context(patch.object(collectives, function.__name__, function))
        yield


def run(
    ranks: int,
    function: Callable[[SequenceGroup], T],
    layout: Layout = "contiguous",
    node_size: int | None = None,
    checks: bool = False,
) -> list[T]:
    """What a function of its group returns on every rank. Each has one thread of torch's.

    node_size: how many consecutive ranks share a node; None: they lie otherwise. checks: as of a SequenceGroup. What a
    rank raises is raised, and ends the others.
    """
    wires = Wires(ranks)

    def work(rank: int) -> T:
        torch.set_num_threads(1)
        place: Any = Place(wires, rank)
        channel = Channel(place, list(range(ranks)))
        try:
            own = SequenceGroup(place, place, rank, ranks, layout, checks, channel, node_size=node_size)
            # Ranks meet to make them, and Python 3.11 lets one thread at a time into a cached property.
            own.__dict__["replicas"] = own
            return function(own)
        except BaseException:
            wires.failed = True
            raise

    with in_memory(), ThreadPoolExecutor(ranks) as pool:
        found = [pool.submit(work, rank) for rank in range(ranks)]
    # Who waited in vain is not the one to be told of.
    for future in sorted(found, key=lambda future: isinstance(future.exception(), Lost)):
        future.result()
    return [future.result() for future in found]
