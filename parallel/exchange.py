"""Carrying out schedules: the one place where maps travel between ranks.

An exchange is started as soon as a rank knows its own maps, runs while the rank computes, and is awaited. In reverse it
carries gradients from the last link to the first. Maps are those of whole links, of which kind the `Monoid` tells; the
makers of maps know runs. What a message speaks of, its sender puts together of what it knows by then.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import count, groupby
from threading import Thread
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from lasp.kernels.chunks import ceil_div
from lasp.kernels.named import named
from lasp.kernels.segment import Segment
from lasp.parallel import collectives
from lasp.parallel.cost import choose
from lasp.parallel.group import SequenceGroup
from lasp.parallel.layout import Link, Plan
from lasp.parallel.monoid import Map, Monoid
from lasp.parallel.scan import Auto, Scan
from lasp.parallel.schedule import EVERYONE, Links, Message, Schedule, Sizes

T = TypeVar("T")


@dataclass(frozen=True)
class Direction:
    """Which way a scan runs, and under which phase it is counted."""

    phase: str
    reverse: bool


FORWARD = Direction("forward", reverse=False)
BACKWARD = Direction("backward", reverse=True)


class Arrival(NamedTuple):
    """What a scan ends with.

    states: what enters each of this rank's links, by place; None where nothing does. kept: transfers that the way back
    needs and nobody sends again, for autograd to save.
    """

    states: list[Tensor | None]
    kept: Tensor | None = None


Steps = Generator[bool, None, Arrival]  # each yield says whether other ranks wait for what comes behind it
Span = tuple[int, int]  # the first link of a stretch, and the one behind its last
Block = tuple[int, int]  # which of how many
Value = Tensor | Map
WHOLE: Block = (0, 1)


class Flight:
    """A scan in flight: what its steps do ahead of their first `yield` is done when it is made.

    The rest is done while this rank computes, if other ranks wait for it: by a thread, for on a CPU somebody has to
    take what has come and send it on. On a GPU all of it is enqueued at once, on a stream of its own. What nobody waits
    for is done when this rank does. like: a tensor on the device. name: what a profiler calls it.
    """

    def __init__(self, steps: Steps, like: Tensor, name: str = "scan") -> None:
        self._steps, self._name = steps, name
        self._inference = torch.is_inference_mode_enabled()  # which a thread of its own would not be in
        self._arrival: Arrival | None = None
        self._error: BaseException | None = None
        self._thread: Thread | None = None
        self._stream = _side_stream(like.device) if like.is_cuda else None
        with named(name, "starts"):
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream(like.device))
                with torch.cuda.stream(self._stream):
                    self._finish_aside()
            elif self._step():
                self._thread = Thread(target=self._finish_aside, daemon=True)
                self._thread.start()
        if self._thread is None and self._error is not None:
            raise self._error

    def wait(self) -> Arrival:
        """What the scan ends with."""
        with named(self._name, "arrives"):
            if self._stream is not None:
                with collectives.waiting():
                    torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            elif self._thread is not None:
                with collectives.waiting():
                    self._thread.join()
            else:
                self._finish()
        if self._error is not None:
            raise self._error
        assert self._arrival is not None, "steps end with an arrival"
        return self._arrival

    def _finish_aside(self) -> None:
        """Take the steps that are left while this rank computes: what they wait for, it does not."""
        with collectives.aside(), named(self._name, "travels"), torch.inference_mode(self._inference):
            self._finish()

    def _finish(self) -> None:
        """Take the steps that are left."""
        with torch.no_grad():
            while self._arrival is None and self._error is None:
                self._step()

    def _step(self) -> bool:
        """Take one; whether other ranks wait for the next."""
        try:
            return next(self._steps)
        except StopIteration as end:
            self._arrival = end.value
        except BaseException as error:
            self._error = error
        return False


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all scans: each begins behind what the device was given before it, and memory goes round in order."""
    return torch.cuda.Stream(device)


def exchange_of(scan: Scan, plan: Plan, group: SequenceGroup, own: Map, monoid: Monoid, keeps: bool = True) -> Exchange:
    """The exchange of a call whose maps are like `own`, by the cheapest scan if it is to be chosen."""
    if isinstance(scan, Auto):
        there, back = (Links.of(plan, group.size, reverse, group.node_size) for reverse in (False, True))
        scan = choose(there, back, sizes_of(own, monoid), group.wires)
    return Exchange(scan, plan, group, keeps)


class Exchange:
    """The scans of one call, on the way there and on the way back. It holds no tensors.

    keeps: whether there will be a way back.
    """

    def __init__(self, scan: Scan, plan: Plan, group: SequenceGroup, keeps: bool) -> None:
        self.scan, self.plan, self.group, self.keeps = scan, plan, group, keeps and scan.remembers

    def start(self, maps: Sequence[Map], monoid: Monoid, direction: Direction = FORWARD) -> Flight:
        """Start a scan over the maps of this rank's links, by place."""
        keep = self.passing() if self.keeps else []
        return Flight(self._steps(maps, monoid, direction, keep), maps[0].state, self._name(direction))

    def start_back(self, maps: Sequence[Segment], monoid: Monoid, kept: Tensor | None) -> Flight:
        """Start the reverse scan over the maps of gradients, after one over maps of the given kind that `kept` this."""
        told = {} if kept is None else {self.plan.links[i]: x for i, x in zip(self.passing(), kept, strict=True)}
        return Flight(self._steps(maps, monoid.adjoint(told), BACKWARD, []), maps[0].state, self._name(BACKWARD))

    def _name(self, direction: Direction) -> str:
        return f"scan {self.scan.name} {direction.phase}"

    def passing(self) -> list[int]:
        """The links that pass gradients to this rank and whose maps it is told forward: their transfers are kept."""
        last = len(self.plan.links) - 1
        return [last - link for link in self._schedule(self.scan, BACKWARD).missing(self.plan.rank)]

    def _schedule(self, scan: Scan, direction: Direction) -> Schedule:
        if direction.reverse and self.keeps:
            return scan.schedule_back(self._back, self._there)
        return scan.schedule(self._back if direction.reverse else self._there)

    @cached_property
    def _there(self) -> Links:
        return Links.of(self.plan, self.group.size, False, self.group.node_size)

    @cached_property
    def _back(self) -> Links:
        return Links.of(self.plan, self.group.size, True, self.group.node_size)

    def _steps(self, maps: Sequence[Map], monoid: Monoid, direction: Direction, keep: list[int]) -> Steps:
        sizes = sizes_of(maps[0], monoid, self.scan.wire)
        links = self._back if direction.reverse else self._there
        scan = self.scan.fitted(links, sizes, self.group.wires)
        schedule = self._schedule(scan, direction)
        if schedule.messages:
            received = schedule.received(self.plan.rank, sizes)
            collectives.record(scan.op, direction.phase, received, schedule.steps)
        chain = self.plan.links[::-1] if direction.reverse else self.plan.links
        rank = _Rank(schedule, chain, self.plan.rank, self.group, maps, monoid, scan.wire)
        yield from rank.follow()
        arrival = Arrival(rank.entering(), rank.transfers(keep))
        rank.known.clear()  # whose values refer to the rank: the buffers would wait for Python's collector
        return arrival


def sizes_of(own: Map, monoid: Monoid, wire: torch.dtype | None = None) -> Sizes:
    """Bytes of what a map like this is sent as."""
    state, transfer = own.state, monoid.transfer_sent(own)
    sent = _length(state.shape, state.dtype, wire) * state.itemsize
    return Sizes(sent, 0 if transfer is None else transfer.nbytes, state.shape[own.dim])


class _Rank:
    """One rank's part in a schedule. chain: all links in the order of the scan; maps: of the rank's own, by place."""

    def __init__(
        self,
        schedule: Schedule,
        chain: tuple[Link, ...],
        rank: int,
        group: SequenceGroup,
        maps: Sequence[Map],
        monoid: Monoid,
        wire: torch.dtype | None,
    ) -> None:
        self.wire = wire
        self.schedule, self.links, self.chain = schedule, schedule.links, chain
        self.rank, self.ranks = rank, group.process_group
        self.monoid, self.like, self.sent_along = monoid, maps[0], monoid.transfer_sent(maps[0])
        self.own = self.links.of_rank(rank)
        self.forms: dict[tuple[bool, int, int], _Form] = {}
        self.known = _Known(self.links, maps[0].dim)
        for link in self.own:
            self.known.add((link, link + 1), partial(maps.__getitem__, chain[link].place))

    # What it ends with ------------------------------------------------------------------------------------------------

    def entering(self) -> list[Tensor | None]:
        """What enters each of its links, by place."""
        by_place = sorted(self.own, key=lambda link: self.chain[link].place)
        return [self._entering(link) if self.links.asks(link) else None for link in by_place]

    def _entering(self, link: int) -> Tensor:
        return _state(self.known.of((self.links.starts[link], link)))

    def transfers(self, links: list[int]) -> Tensor | None:
        """Those of some links; None if they need not be kept."""
        found = [self.monoid.kept(self.known.of((i, i + 1)), partial(self._entering, i)) for i in links]
        kept = [transfer for transfer in found if transfer is not None]
        return torch.stack(kept) if kept else None  # copied: views would keep all messages

    # How it gets there ------------------------------------------------------------------------------------------------

    def follow(self) -> Generator[bool, None, None]:
        """Send and receive, with a `yield` wherever this rank waits for others: whether some wait for it in turn."""
        self.pending: list[collectives.Pending[Tensor]] = []  # all of them: what nobody reads must arrive as well
        self._meet()
        arrivals, sent = ([m.step for m in own(self.rank)] for own in (self.schedule.to, self.schedule.from_))
        arrived = 0
        for step, messages in groupby(self.schedule.of_rank(self.rank), lambda m: m.step):
            if arrivals and arrivals[0] < step:
                yield bool(sent) and step <= sent[-1]
            together = list(messages)
            if together[0].target == EVERYONE:
                ahead, self.pending = self.pending, []
                self._gather(together)
                if ahead:
                    self._fold(arrived, ahead)
                arrived = together[-1].last
            else:
                for message in together:
                    if message.source == self.rank:
                        self._send(message)
        yield False
        for pending in self.pending:
            pending.wait()

    def _gather(self, messages: list[Message]) -> None:
        """What everyone is sent in one step: by one all-gather where each rank sends as much, or else one by one."""
        of_rank: dict[int, list[Message]] = {rank: [] for rank in range(self.links.size)}
        for message in messages:
            of_rank[message.source].append(message)
        own = of_rank.pop(self.rank)
        if any(len(sent) != len(own) for sent in of_rank.values()):
            for message in messages:
                self._broadcast(message)
            return
        pending = collectives.gather(torch.stack(list(map(self._pack, own))), self.ranks)
        self.pending.append(pending)
        parts = _Later(lambda: pending.wait().split(self._form(messages[0]).lengths, -1))
        for rank, sent in of_rank.items():
            for place, message in enumerate(sent):
                self._expect(message, partial(_row, parts, rank, place))

    def _broadcast(self, message: Message) -> None:
        own = message.source == self.rank
        tensor = self._pack(message) if own else self._buffer(message)
        self.pending.append(collectives.broadcast(tensor, message.source, self.ranks))
        if not own:
            self._arrive(message)

    def _fold(self, arrived: int, pending: list[collectives.Pending[Tensor]]) -> None:
        """Let what has come, the maps of the first links, enter as far as it goes, and forget it."""
        for each in pending:
            each.wait()
        asking = [(self.links.starts[link], min(link, arrived)) for link in self.own if self.links.asks(link)]
        self.known.settle({(start, last) for start, last in asking if start < last}, arrived)

    def _meet(self) -> None:
        """Line up the messages with each other rank, and post the receives of those that come ahead of any to it.

        No others: between two ranks NCCL carries messages one after the other.
        """
        self.lines: dict[int, deque[Message]] = defaultdict(deque)
        self.tags: dict[int, Iterator[int]] = defaultdict(count)
        for message in self.schedule.of_rank(self.rank):
            if message.target != EVERYONE:
                self.lines[message.target if message.source == self.rank else message.source].append(message)
        for peer in self.lines:
            self._receive(peer)

    def _receive(self, peer: int) -> None:
        line = self.lines[peer]
        while line and line[0].target == self.rank:
            message = line.popleft()
            self.pending.append(collectives.receive(self._buffer(message), peer, self.ranks, next(self.tags[peer])))
            self._arrive(message)

    def _send(self, message: Message) -> None:
        peer = message.target
        self.lines[peer].popleft()
        self.pending.append(collectives.send(self._pack(message), peer, self.ranks, next(self.tags[peer])))
        self._receive(peer)

    # What a message holds: a state, and behind it a transfer where one must be told -----------------------------------

    def _pack(self, message: Message) -> Tensor:
        span, block = (message.first, message.last), (message.block, message.blocks)
        value = self.known.of(span, block, message.step)
        self.known.add(span, lambda: value, block, message.step)
        state = _narrow(_state(value).flatten(), self.wire)
        if len(self._form(message).shapes) == 1:
            return state
        transfer = self.monoid.transfer_sent(value)
        assert transfer is not None, "the monoid sends those of all maps, or of none"
        return torch.cat([state, transfer.flatten()])

    def _buffer(self, message: Message) -> Tensor:
        return self.like.state.new_empty(sum(self._form(message).lengths))

    def _arrive(self, message: Message) -> None:
        """Expect a message of the exchange that was started last."""
        pending, lengths = self.pending[-1], self._form(message).lengths
        self._expect(message, lambda: pending.wait().split(lengths))

    def _expect(self, message: Message, parts: Callable[[], Sequence[Tensor]]) -> None:
        span, block = (message.first, message.last), (message.block, message.blocks)
        self.known.add(span, lambda: self._unpack(message, parts()), block, message.step)

    def _unpack(self, message: Message, parts: Sequence[Tensor]) -> Value:
        state_shape, *shapes = self._form(message).shapes
        state = _widened(parts[0], state_shape, self.wire)
        if self.links.is_state(message.first, message.last):
            return state
        transfer = [part.view(shape) for part, shape in zip(parts[1:], shapes, strict=True)]
        return self.monoid.unpack(self.chain[message.first : message.last], state, *transfer)

    def _form(self, message: Message) -> _Form:
        kind = message.maps, message.block, message.blocks
        if kind not in self.forms:
            state = self.like.state.tensor_split(message.blocks, self.like.dim)[message.block]
            told = [self.sent_along.shape] if message.maps and self.sent_along is not None else []
            lengths = [_length(state.shape, state.dtype, self.wire), *map(math.prod, told)]
            self.forms[kind] = _Form([state.shape, *told], lengths)
        return self.forms[kind]


class _Form(NamedTuple):
    """The shapes of what a message holds, and how many elements each takes on the wire."""

    shapes: list[torch.Size]
    lengths: list[int]


def _length(shape: torch.Size, dtype: torch.dtype, wire: torch.dtype | None) -> int:
    """How many elements of a dtype a state takes on the wire."""
    return math.prod(shape) if wire is None else ceil_div(math.prod(shape) * wire.itemsize, dtype.itemsize)


def _narrow(state: Tensor, wire: torch.dtype | None) -> Tensor:
    """A flat state as it travels: rounded, two or four elements in the place of one."""
    if wire is None:
        return state
    rounded = state.to(wire)
    packed = rounded.new_zeros(_length(state.shape, state.dtype, wire) * state.itemsize // wire.itemsize)
    packed[: rounded.numel()] = rounded
    return packed.view(state.dtype)


def _widened(flat: Tensor, shape: torch.Size, wire: torch.dtype | None) -> Tensor:
    """The state that `_narrow` made this of."""
    return (flat if wire is None else flat.view(wire)[: math.prod(shape)].to(flat.dtype)).view(shape)


def _same(value: Value) -> Value:
    return value


def _row(parts: _Later[Sequence[Tensor]], rank: int, place: int) -> list[Tensor]:
    return [part[rank, place] for part in parts()]


def _state(value: Value) -> Tensor:
    """What leaves a stretch that nothing enters."""
    return value if isinstance(value, Tensor) else value.state


class _Later(Generic[T]):
    """What is made when it is first asked for, and known from a step on."""

    __slots__ = ("_make", "_value", "step")

    def __init__(self, make: Callable[[], T], step: int = -1) -> None:
        self._make: Callable[[], T] | None = make
        self.step = step

    def __call__(self) -> T:
        if self._make is not None:
            self._value, self._make = self._make(), None
        return self._value


class _Known:
    """What a rank knows of stretches of links, and from which step on: maps, or states where nothing passes through.

    dim: along which states are cut into blocks.
    """

    def __init__(self, links: Links, dim: int) -> None:
        self._links, self._dim = links, dim
        self._values: dict[Span, dict[Block, _Later[Value]]] = defaultdict(dict)

    def add(self, span: Span, value: Callable[[], Value], block: Block = WHOLE, step: int = -1) -> None:
        """value: waits for it, if it has to come."""
        self._values[span].setdefault(block, _Later(value, step))

    def of(self, span: Span, block: Block = WHOLE, before: float = math.inf) -> Value:
        """What a stretch does to a block of the state, put together of what is known before a step."""
        path = self._path(span, block, before)
        value = self._piece(path[0], block)
        if len(path) > 1 and self._links.is_state(*path[0]):
            value = _state(value)
        for later in path[1:]:
            own = self._piece(later, block)
            assert not isinstance(own, Tensor), "something passes through all but the first"
            value = own(value) if isinstance(value, Tensor) else value.then(own)
        return value

    def clear(self) -> None:
        self._values.clear()

    def settle(self, spans: set[Span], arrived: int) -> None:
        """Put these together, and forget all else that came from other ranks of links before `arrived`."""
        whole = {span: self.of(span) for span in spans}
        for span, blocks in list(self._values.items()):
            if span[1] <= arrived and all(value.step >= 0 for value in blocks.values()):
                del self._values[span]
        for span, value in whole.items():
            self.add(span, partial(_same, value), step=0)

    def _path(self, span: Span, block: Block, before: float) -> list[Span]:
        """As few known stretches as make up this one."""
        if span in self._values and self._has(span, block, before):
            return [span]
        first, last = span
        ways: dict[int, tuple[int, Span]] = {last: (0, span)}
        for known in sorted(self._values, reverse=True):
            if first <= known[0] and known[1] in ways and self._has(known, block, before):
                pieces = 1 + ways[known[1]][0]
                if known[0] not in ways or pieces < ways[known[0]][0]:
                    ways[known[0]] = pieces, known
        assert first in ways, f"links {span} before step {before}: a schedule is checked when it is made"
        path = []
        while first < last:
            path.append(ways[first][1])
            first = path[-1][1]
        return path

    def _has(self, span: Span, block: Block, before: float) -> bool:
        blocks = self._values[span]
        for own in (WHOLE, block):
            if own in blocks and blocks[own].step < before:
                return True
        return block == WHOLE and len(blocks) == next(iter(blocks))[1] and all(x.step < before for x in blocks.values())

    def _piece(self, span: Span, block: Block) -> Value:
        blocks = self._values[span]
        if block in blocks:
            return blocks[block]()
        if WHOLE not in blocks:
            return torch.cat([_state(blocks[own]()) for own in sorted(blocks)], self._dim)
        whole = blocks[WHOLE]()
        index, count = block
        return whole.tensor_split(count, self._dim)[index] if isinstance(whole, Tensor) else whole.block(index, count)


# From links to runs -------------------------------------------------------------------------------------------------


def enter_runs(plan: Plan, links: list[Tensor | None], initial: list[Tensor | None]) -> list[Tensor | None]:
    """What enters each run: `initial` where its document begins, or else what enters its link."""
    by_link = {(link.chain, link.order): links[link.place] for link in plan.own_links}
    return [initial[i] if run.reset else by_link[run.chain, run.order] for i, run in enumerate(plan.runs)]


def enter_ends(plan: Plan, links: list[Tensor | None], ends: list[Tensor | None]) -> list[Tensor | None]:
    """What enters each run's end, backwards: `ends` where its document ends, or else what enters its link's end."""
    by_link = {(link.chain, link.order): links[link.place] for link in plan.own_links}
    return [ends[i] if run.last else by_link[run.chain, run.order] for i, run in enumerate(plan.runs)]


def given_back(plan: Plan, link: Link, grad: Tensor) -> Tensor:
    """The gradient of what enters one of this rank's links, given that of what enters its first run: nothing where a
    document begins with it, in which the links before have no part."""
    return torch.zeros_like(grad) if plan.runs[plan.runs_of(link)[0]].reset else grad
