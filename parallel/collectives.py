"""Every torch.distributed call that moves data, and the ledger that counts them.

Free functions with an explicit process group. The asynchronous ones return a `Pending`, which owns the buffers until
`wait()`. In a group of one rank nothing is called and nothing is counted. In a trace of torch.profiler an exchange is
called by its operation and phase, `lasp::all_reduce gradients`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.kernels.named import named

T = TypeVar("T")

# Of headers. Scans and rings tag messages by link and piece, of which each rank has two at most.
_HEADER_TAG = 32_767  # the largest that every MPI takes

# torch 2.13 renamed these two; GPU machines still have 2.11.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Record(NamedTuple):
    """One exchange as this rank saw it."""

    op: str  # "all_gather" | "all_reduce" | "reduce_scatter" | "all_to_all" | "broadcast" | "barrier" | "ring" | a scan
    phase: str  # "forward" | "backward" | "gradients" | "parameters" | "control"
    bytes: int  # received by this rank, as a bandwidth-optimal algorithm would
    steps: int  # messages that wait for one another, over all ranks


Mark = float | torch.cuda.Event
"""A moment: seconds of a clock, or a place in the current stream of a GPU."""


@dataclass
class Ledger:
    """What crossed between ranks inside a `traffic()` block, and how long this rank waited for it."""

    records: list[Record] = field(default_factory=list)
    device: torch.device | None = None
    """Where this rank computes: waiting for a GPU's exchanges holds up its stream, and not Python."""

    waits: list[tuple[Mark, Mark]] = field(default_factory=list)
    launched: list[Mark] = field(default_factory=list)
    landed: list[Mark] = field(default_factory=list)
    """Gradients that DDP reduces: the last ones that set out, and arrived. Nothing is computed between the two."""

    def of(self, phase: str) -> list[Record]:
        """The records of one phase."""
        return [record for record in self.records if record.phase == phase]

    @property
    def received(self) -> int:
        """Bytes that this rank received."""
        return sum(record.bytes for record in self.records)

    def waited(self) -> float:
        """Seconds in which this rank waited for exchanges and did nothing else. What a GPU waited for must be over."""
        waits = [*self.waits, *zip(self.launched[-1:], self.landed[-1:], strict=False)]
        return sum(max(0.0, _between(begin, end)) for begin, end in waits)

    def mark(self) -> Mark:
        """This moment."""
        if self.device is None or self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begin: Mark, end: Mark) -> float:
    """Seconds from one moment to another of the same kind."""
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()  # over long ago where a step has been read
        return float(begin.elapsed_time(end)) / 1000
    assert isinstance(begin, float)
    assert isinstance(end, float), "both are of one ledger"
    return end - begin


@dataclass(eq=False)
class Last:
    """How many exchanges there were, and which was the last."""

    count: int = 0
    name: str = "none"


# Open ledgers. A module-level list, not a ContextVar: backward runs on threads that inherit no context.
_open_ledgers: list[Ledger] = []
_followers: list[Last] = []


@contextmanager
def traffic(device: torch.device | str | None = None) -> Iterator[Ledger]:
    """Count every exchange of this process while the block runs: `with lasp.traffic() as ledger: ...`.

    device: where this rank computes; by default a CPU. Only what is waited for there is timed.
    """
    ledger = Ledger(device=None if device is None else torch.device(device))
    _open_ledgers.append(ledger)
    try:
        yield ledger
    finally:
        _open_ledgers.remove(ledger)


@contextmanager
def following(last: Last) -> Iterator[None]:
    """Count every exchange of this process while the block runs, and keep no more than the last one's name."""
    _followers.append(last)
    try:
        yield
    finally:
        _followers.remove(last)


class _Thread(threading.local):
    """Whether waiting in this thread keeps nobody from computing, or is timed already."""

    aside = False


_thread = _Thread()


@contextmanager
def aside() -> Iterator[None]:
    """Time no waiting of this thread while the block runs."""
    before, _thread.aside = _thread.aside, True
    try:
        yield
    finally:
        _thread.aside = before


@contextmanager
def waiting() -> Iterator[None]:
    """Write into every open ledger that this rank waits while the block runs."""
    ledgers = () if _thread.aside else tuple(_open_ledgers)
    begins = [ledger.mark() for ledger in ledgers]
    with aside():
        yield
    for ledger, begin in zip(ledgers, begins, strict=True):
        ledger.waits.append((begin, ledger.mark()))


def record(op: str, phase: str, num_bytes: int, steps: int) -> None:
    """Write one exchange into every open ledger."""
    for ledger in _open_ledgers:
        ledger.records.append(Record(op, phase, num_bytes, steps))
    reached(f"{op} of {phase}")


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether an error of an exchange says that another rank is gone, as far as this one can tell."""
    # gloo's errors are RuntimeErrors that begin with the place in its sources.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def reached(place: str) -> None:
    """Tell who follows that this rank has come to a place which all ranks come to: an exchange, or what is like one."""
    for last in _followers:
        last.count, last.name = last.count + 1, place


@dataclass
class Pending(Generic[T]):
    """An exchange in flight, with the buffers it needs. `wait()` returns its result and may be called again."""

    works: list[Any]
    result: T
    finish: Callable[[T], T] | None = None
    sent: Sequence[Any] = ()  # kept until they have left
    limit: timedelta | None = None  # of a wait, where it is not the works' own

    def wait(self) -> T:
        if self.works:
            with waiting():
                for work in self.works:
                    work.wait() if self.limit is None else work.wait(self.limit)
        self.works, self.sent = [], ()
        if self.finish is not None:
            self.result, self.finish = self.finish(self.result), None
        return self.result


def all_gather(tensor: Tensor, group: dist.ProcessGroup, phase: str) -> Pending[Tensor]:
    """Start gathering equal tensors [...] into [W, ...], in order of rank."""
    if (size := dist.get_world_size(group)) > 1:
        record("all_gather", phase, (size - 1) * tensor.nbytes, 1)
    with named("all_gather", phase):
        return gather(tensor, group)


def gather(tensor: Tensor, group: dist.ProcessGroup) -> Pending[Tensor]:
    """The same, where the caller counts."""
    size = dist.get_world_size(group)
    tensor = tensor.contiguous().resolve_conj()
    if size == 1:
        return Pending([], tensor.unsqueeze(0))
    result = tensor.new_empty(size, *tensor.shape)
    # Flat on both sides: gloo wants the input's dims to match the output's.
    work = _all_gather(_words(result), _words(tensor), group=group, async_op=True)
    return Pending([work], result, sent=[tensor])


def _numbers(tensor: Tensor) -> Tensor:
    """What travels of a contiguous tensor, in its memory: of a complex one pairs of real numbers."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


# What every backend sends. gloo has no word for int16, NCCL for uint16.
_SENT = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8}


def _words(tensor: Tensor) -> Tensor:
    """The same, flat, where nothing is added up: bytes of what a backend does not know."""
    flat = _numbers(tensor).view(-1)
    return flat if flat.dtype in _SENT else flat.view(torch.uint8)


def broadcast(tensor: Tensor, source: int, group: dist.ProcessGroup) -> Pending[Tensor]:
    """Start sending a tensor of one rank to all others, which receive it in place. The caller counts."""
    tensor = tensor.contiguous().resolve_conj()
    return Pending([dist.broadcast(_words(tensor), group=group, group_src=source, async_op=True)], tensor)


def swap_headers(header: Tensor, ranks: Sequence[int], group: dist.ProcessGroup) -> Pending[Tensor]:
    """Start gathering the equally long headers of some ranks of the group into [ranks, bytes], in their order.

    Messages between every two ranks, which no other exchange of the group can meet, nor disturb; for so little they
    also take half the time of gloo's all-gather.
    """
    own = dist.get_rank(group)
    rows = header.new_empty(len(ranks), *header.shape)
    rows[ranks.index(own)] = header
    if len(ranks) == 1:
        return Pending([], rows)
    record("all_gather", "control", (len(ranks) - 1) * header.nbytes, 1)
    others = [(rank, row) for rank, row in zip(ranks, rows, strict=True) if rank != own]
    sends = [dist.isend(header, group=group, group_dst=rank, tag=_HEADER_TAG) for rank, _ in others]
    receives = [dist.irecv(row, group=group, group_src=rank, tag=_HEADER_TAG) for rank, row in others]
    return Pending([*receives, *sends], rows, sent=[header], limit=_patience(header, group))


def all_reduce(tensor: Tensor, group: dist.ProcessGroup, phase: str) -> Pending[Tensor]:
    """Start summing a contiguous tensor over the ranks, in place."""
    size = dist.get_world_size(group)
    if size == 1:
        return Pending([], tensor)
    record("all_reduce", phase, 2 * (size - 1) * tensor.nbytes // size, 1)
    tensor = tensor.resolve_conj()
    with named("all_reduce", phase):
        return Pending([dist.all_reduce(_numbers(tensor), group=group, async_op=True)], tensor)


def all_reduce_future(
    tensor: Tensor, group: dist.ProcessGroup, phase: str, divisor: int
) -> torch.futures.Future[Tensor]:
    """Start summing a tensor over the ranks in place and dividing the sum: what a DDP communication hook returns."""
    size = dist.get_world_size(group)
    record("all_reduce", phase, 2 * (size - 1) * tensor.nbytes // size, 1)
    ledgers = tuple(_open_ledgers)

    def land(done: torch.futures.Future[list[Tensor]]) -> Tensor:
        for ledger in ledgers:
            ledger.landed.append(ledger.mark())
        return done.value()[0].div_(divisor)

    with named("all_reduce", phase):
        for ledger in ledgers:
            ledger.launched.append(ledger.mark())
        return dist.all_reduce(tensor, group=group, async_op=True).get_future().then(land)


def reduce_scatter(tensor: Tensor, group: dist.ProcessGroup, phase: str) -> Pending[Tensor]:
    """Start summing [W, ...] over the ranks, rank r keeping part r [...]."""
    size = dist.get_world_size(group)
    tensor = tensor.contiguous().resolve_conj()
    if size == 1:
        return Pending([], tensor[0])
    result = tensor.new_empty(tensor.shape[1:])
    record("reduce_scatter", phase, (size - 1) * result.nbytes, 1)
    with named("reduce_scatter", phase):
        return Pending(
            [_reduce_scatter(_numbers(result).view(-1), _numbers(tensor).view(-1), group=group, async_op=True)], result
        )


def send(tensor: Tensor, to: int, group: dist.ProcessGroup, tag: int) -> Pending[Tensor]:
    """Start sending to a rank of the group. The caller counts: a scan is one exchange of many messages."""
    tensor = tensor.contiguous().resolve_conj()
    works = [dist.isend(_numbers(tensor), group=group, group_dst=to, tag=tag)] if tensor.numel() else []
    return Pending(works, tensor, limit=_patience(tensor, group))


def receive(buffer: Tensor, source: int, group: dist.ProcessGroup, tag: int) -> Pending[Tensor]:
    """Start receiving into a contiguous buffer from a rank of the group."""
    works = [dist.irecv(_numbers(buffer), group=group, group_src=source, tag=tag)] if buffer.numel() else []
    return Pending(works, buffer, limit=_patience(buffer, group))


class Message(NamedTuple):
    """A tensor to send to, or a buffer to receive from, a rank of the group. Tags tell messages of two ranks apart."""

    tensor: Tensor
    peer: int
    tag: int


def rotate(outgoing: list[Message], incoming: list[Message], group: dist.ProcessGroup | None, result: T) -> Pending[T]:
    """Start messages between ranks, one hop of a ring, all at once; `result` holds the incoming buffers. The caller
    counts."""
    # One batch: NCCL would otherwise run the messages one after the other, and wait for peers that do the same.
    operations = [dist.P2POp(dist.isend, m.tensor, group=group, group_peer=m.peer, tag=m.tag) for m in outgoing]
    operations += [dist.P2POp(dist.irecv, m.tensor, group=group, group_peer=m.peer, tag=m.tag) for m in incoming]
    works = dist.batch_isend_irecv(operations) if operations else []
    limit = _patience(operations[0].tensor, group) if operations else None
    return Pending(works, result, sent=outgoing, limit=limit)


def _patience(message: Tensor, group: dist.ProcessGroup | None) -> timedelta | None:
    """How long a message between two ranks is waited for. None on a GPU, where waiting holds up the stream.

    gloo's own limit of these is what their group was made with, whatever the group's timeout has become since.
    """
    if message.is_cuda:
        return None
    backend = (group or dist.group.WORLD)._get_backend(message.device)  # type: ignore[union-attr]
    return backend.options._timeout if isinstance(backend, dist.ProcessGroupGloo) else None


def all_to_all(
    parts: list[Tensor], sizes: list[int], peers: Sequence[int], group: dist.ProcessGroup, phase: str
) -> Pending[list[Tensor]]:
    """Start sending flat part j to the rank `peers[j]` of the group; the result is what each sent here, `sizes[j]`
    elements.

    Only the peers take part, this rank among them: a process group of their own would have to be made by the world.
    """
    own = list(peers).index(dist.get_rank(group))
    record("all_to_all", phase, (sum(sizes) - sizes[own]) * parts[0].element_size(), 1)
    result = [parts[j] if j == own else parts[j].new_empty(sizes[j]) for j in range(len(peers))]
    others = [j for j in range(len(peers)) if j != own]
    outgoing = [Message(parts[j], peers[j], 0) for j in others if parts[j].numel()]
    with named("all_to_all", phase):
        return rotate(outgoing, [Message(result[j], peers[j], 0) for j in others if sizes[j]], group, result)


def barrier(group: dist.ProcessGroup | None) -> None:
    """Wait until every rank of the group, or of the world, is here."""
    if dist.get_world_size(group) > 1:
        record("barrier", "control", 0, 1)
        dist.barrier(group=group)
