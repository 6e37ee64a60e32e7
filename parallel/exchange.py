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
from functools import cache, partial
from itertools import count, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.kernels.segment import Segment
from lasp.parallel import collectives
from lasp.parallel.group import SequenceGroup
from lasp.parallel.layout import Link, Plan
from lasp.parallel.monoid import Map, Monoid
from lasp.parallel.scan import Scan
from lasp.parallel.schedule import EVERYONE, Links, Message, Schedule, Sizes


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


Steps = Generator[None, None, Arrival]
Span = tuple[int, int]  # the first link of a stretch, and the one behind its last
Block = tuple[int, int]  # which of how many
Value = Tensor | Map
WHOLE: Block = (0, 1)


class Flight:
    """A scan in flight: whatever its steps do ahead of their first `yield` is done when it is made."""

    def __init__(self, steps: Steps) -> None:
        self._arrival: Arrival | None = None
        self._steps = self._run(steps)
        next(self._steps, None)

    def wait(self) -> Arrival:
        """Take the remaining steps."""
        for _ in self._steps:
            pass
        assert self._arrival is not None, "steps end with an arrival"
        return self._arrival

    def _run(self, steps: Steps) -> Generator[None, None, None]:
        self._arrival = yield from steps


class Exchange:
    """The scans of one call, on the way there and on the way back. It holds no tensors.

    keeps: whether there will be a way back.
    """

    def __init__(self, scan: Scan, plan: Plan, group: SequenceGroup, keeps: bool) -> None:
        self.scan, self.plan, self.group, self.keeps = scan, plan, group, keeps and scan.remembers

    def start(self, maps: Sequence[Map], monoid: Monoid, direction: Direction = FORWARD) -> Flight:
        """Start a scan over the maps of this rank's links, by place."""
        return Flight(self._steps(maps, monoid, direction, self.later_links() if self.keeps else []))

    def start_back(self, maps: Sequence[Segment], monoid: Monoid, kept: Tensor | None) -> Flight:
        """Start the reverse scan over the maps of gradients, after one over maps of the given kind that `kept` this."""
        transfers = {} if kept is None else dict(zip(self.later_links(), kept, strict=True))
        return Flight(self._steps(maps, monoid.adjoint(transfers), BACKWARD, [], returns=self.keeps))

    def later_links(self) -> list[Link]:
        """The links of other ranks through which gradients come to this one, as far as the scan forward tells their
        maps: whose transfers are kept."""
        links, rank = self._links(reverse=True), self.plan.rank
        told, last = self.scan.schedule(self._links()).told(rank), len(links.ranks) - 1
        passed = (last - link for link in links.passed(rank))
        return [self.plan.links[i] for i in passed if i in told and self.plan.links[i].rank != rank]

    def _links(self, reverse: bool = False) -> Links:
        return Links.of(self.plan, self.group.size, reverse)

    def _steps(
        self, maps: Sequence[Map], monoid: Monoid, direction: Direction, keep: list[Link], returns: bool = False
    ) -> Steps:
        if not maps:  # a sequence without tokens
            return Arrival([])
        links, sizes = self._links(direction.reverse), sizes_of(maps[0], monoid)
        scan = self.scan.fitted(links, sizes)
        schedule = scan.schedule(links)
        if returns:
            schedule = schedule.after(scan.schedule(self._links()))
        if schedule.messages:
            received = schedule.received(self.plan.rank, sizes)
            collectives.record(scan.op, direction.phase, received, schedule.steps)
        chain = self.plan.links[::-1] if direction.reverse else self.plan.links
        rank = _Rank(schedule, chain, self.plan.rank, self.group, maps, monoid)
        yield from rank.follow()
        return Arrival(rank.entering(), rank.transfers(keep))


def sizes_of(own: Map, monoid: Monoid) -> Sizes:
    """Bytes of what a map like this is sent as."""
    transfer = monoid.transfer_sent(own)
    return Sizes(own.state.nbytes, 0 if transfer is None else transfer.nbytes, own.state.shape[own.dim])


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
    ) -> None:
        self.schedule, self.links, self.chain = schedule, schedule.links, chain
        self.rank, self.ranks = rank, group.process_group
        self.monoid, self.like, self.sent_along = monoid, maps[0], monoid.transfer_sent(maps[0])
        self.own = self.links.of_rank(rank)
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

    def transfers(self, links: list[Link]) -> Tensor | None:
        """Those of some links; None if they need not be kept."""
        places = map(self.chain.index, links)
        found = [self.monoid.kept(self.known.of((i, i + 1)), partial(self._entering, i)) for i in places]
        kept = [transfer for transfer in found if transfer is not None]
        return torch.stack(kept) if kept else None  # copied: views would keep all messages

    # How it gets there ------------------------------------------------------------------------------------------------

    def follow(self) -> Generator[None, None, None]:
        """Send and receive, with a `yield` wherever this rank waits for others and had better compute."""
        self.pending: list[collectives.Pending[Tensor]] = []  # all of them: what nobody reads must arrive as well
        self._meet()
        arrivals = [m.step for m in self.schedule.to(self.rank)]
        for step, messages in groupby(self.schedule.messages, lambda m: m.step):
            if any(arrival < step for arrival in arrivals[:1]):
                yield
            together = list(messages)
            if together[0].target == EVERYONE:
                self._gather(together)
            else:
                for message in together:
                    if message.source == self.rank:
                        self._send(message)
        yield
        for pending in self.pending:
            pending.wait()

    def _gather(self, messages: list[Message]) -> None:
        """What everyone is sent in one step, as much of it by each rank."""
        of_rank = {rank: [m for m in messages if m.source == rank] for rank in range(self.links.size)}
        pending = collectives.gather(torch.stack([self._pack(m) for m in of_rank[self.rank]]), self.ranks)
        self.pending.append(pending)
        for rank, sent in of_rank.items():
            for place, message in enumerate(sent):
                if rank != self.rank:
                    self._expect(message, partial(_row, pending, rank, place))

    def _meet(self) -> None:
        """Line up the messages with each other rank, and post the receives of those that come ahead of any to it.

        No others: between two ranks NCCL carries messages one after the other.
        """
        self.lines: dict[int, deque[Message]] = defaultdict(deque)
        self.tags: dict[int, Iterator[int]] = defaultdict(count)
        for message in self.schedule.messages:
            if message.target != EVERYONE and self.rank in (message.source, message.target):
                self.lines[message.target if message.source == self.rank else message.source].append(message)
        for peer in self.lines:
            self._receive(peer)

    def _receive(self, peer: int) -> None:
        line = self.lines[peer]
        while line and line[0].target == self.rank:
            message = line.popleft()
            buffer = self.like.state.new_empty(sum(map(math.prod, self._shapes(message))))
            self.pending.append(collectives.receive(buffer, peer, self.ranks, next(self.tags[peer])))
            self._expect(message, self.pending[-1].wait)

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
        if len(self._shapes(message)) == 1:
            return _state(value).flatten()
        transfer = self.monoid.transfer_sent(value)
        assert transfer is not None, "the monoid sends those of all maps, or of none"
        return torch.cat([_state(value).flatten(), transfer.flatten()])

    def _expect(self, message: Message, arrive: Callable[[], Tensor]) -> None:
        span, block = (message.first, message.last), (message.block, message.blocks)
        self.known.add(span, lambda: self._unpack(message, arrive()), block, message.step)

    def _unpack(self, message: Message, flat: Tensor) -> Value:
        shapes = self._shapes(message)
        parts = flat.split([math.prod(shape) for shape in shapes])
        state, *transfer = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        if self.links.is_state(message.first, message.last):
            return state
        return self.monoid.unpack(self.chain[message.first : message.last], state, *transfer)

    def _shapes(self, message: Message) -> list[torch.Size]:
        state = self.like.state.tensor_split(message.blocks, self.like.dim)[message.block].shape
        return [state] if self.sent_along is None or not message.maps else [state, self.sent_along.shape]


def _row(pending: collectives.Pending[Tensor], rank: int, place: int) -> Tensor:
    return pending.wait()[rank, place]


def _state(value: Value) -> Tensor:
    """What leaves a stretch that nothing enters."""
    return value if isinstance(value, Tensor) else value.state


class _Known:
    """What a rank knows of stretches of links, and from which step on: maps, or states where nothing passes through.

    dim: along which states are cut into blocks.
    """

    def __init__(self, links: Links, dim: int) -> None:
        self._links, self._dim = links, dim
        self._values: dict[Span, dict[Block, tuple[int, Callable[[], Value]]]] = defaultdict(dict)

    def add(self, span: Span, value: Callable[[], Value], block: Block = WHOLE, step: int = -1) -> None:
        """value: waits for it, if it has to come."""
        self._values[span].setdefault(block, (step, cache(value)))

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

    def _path(self, span: Span, block: Block, before: float) -> list[Span]:
        """As few known stretches as make up this one."""
        first, last = span
        ways: dict[int, list[Span]] = {last: []}
        for known in sorted(self._values, reverse=True):
            if first <= known[0] and known[1] in ways and self._has(known, block, before):
                way = [known, *ways[known[1]]]
                if len(way) < len(ways.get(known[0], way)) + (known[0] not in ways):
                    ways[known[0]] = way
        assert first in ways, f"nobody has told of links {span} before step {before}"
        return ways[first]

    def _has(self, span: Span, block: Block, before: float) -> bool:
        known = {own for own, (step, _) in self._values[span].items() if step < before}
        return WHOLE in known or block in known or (block == WHOLE and len(known) == next(iter(known), WHOLE)[1])

    def _piece(self, span: Span, block: Block) -> Value:
        blocks = self._values[span]
        if block in blocks:
            return blocks[block][1]()
        if WHOLE not in blocks:
            return torch.cat([_state(blocks[own][1]()) for own in sorted(blocks)], self._dim)
        whole = blocks[WHOLE][1]()
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
