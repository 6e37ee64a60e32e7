"""Schedules: which rank sends which other rank what, and in which step. Integers, no tensors, no torch.distributed.

    links = Links.of(plan, size)             all links in the order in which a scan meets them; reverse=True: backwards
    schedule = Ring().schedule(links)        of any scan of `scan.py`
    schedule.messages                        by step; those of one step do not wait for one another
    schedule.steps                           how many wait for one another
    schedule.received(rank, sizes)           bytes; schedule.sent(rank, sizes)
    sizes.of(message)                        bytes of one message

A message carries what a stretch of consecutive links does: a *state* where nothing passes through the stretch from
before (the chain begins with it, or a document begins in its first link), else a *map*, which has a transfer beside the
state. One executor (`exchange.py`) carries schedules out; the ledger counts what they say, and so does whoever predicts
what they cost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from lasp.parallel.layout import Plan

EVERYONE = -1  # the target of what all ranks are sent by one collective


class Message(NamedTuple):
    """What links `first` .. `last - 1` do together, on its way from the rank `source` to the rank `target`.

    maps: a map travels, with its transfer where the target cannot know it; else a state alone. block: the part of it,
    of so many `blocks` into which a state is cut.
    """

    step: int
    source: int
    target: int
    first: int
    last: int
    maps: bool = False
    block: int = 0
    blocks: int = 1


class Sizes(NamedTuple):
    """Bytes of one state and of one transfer, 0 where transfers are known; rows: of a state, along which it is cut."""

    state: int
    transfer: int
    rows: int

    def of(self, message: Message) -> int:
        """Bytes of a message."""
        rows = self.rows // message.blocks + (message.block < self.rows % message.blocks)
        return self.state * rows // max(self.rows, 1) + (self.transfer if message.maps else 0)


@dataclass(frozen=True)
class Links:
    """The links of a call in the order in which a scan meets them; a link is known by its place in that order.

    ranks: who holds each. closed: nothing passes through it, what leaves it does not depend on what enters. fresh: it
    is closed, and has no use for what enters either. size: number of ranks; node_size: how many consecutive ones are
    neighbours in a node, None where the ranks lie otherwise.
    """

    ranks: tuple[int, ...]
    closed: tuple[bool, ...]
    fresh: tuple[bool, ...]
    size: int
    node_size: int | None = None

    @staticmethod
    def of(plan: Plan, size: int, reverse: bool = False, node_size: int | None = None) -> Links:
        """Those of a plan over `size` ranks. Backwards nothing enters a link whose last document ends with it."""
        links = plan.links[::-1] if reverse else plan.links
        return Links(
            ranks=tuple(link.rank for link in links),
            closed=tuple(link.reset or (reverse and link.closes) for link in links),
            fresh=tuple(link.closes if reverse else link.opens for link in links),
            size=size,
            node_size=node_size,
        )

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Of each link the first one that has a part in what enters it."""
        starts = [0]
        for link, closed in enumerate(self.closed[:-1]):
            starts.append(link if closed else starts[-1])
        return tuple(starts[: len(self.ranks)])

    def asks(self, link: int) -> bool:
        """Whether it has a use for what enters it, and something does."""
        return link > 0 and not self.fresh[link]

    def is_state(self, first: int, last: int) -> bool:
        """Whether nothing passes through links `first` .. `last - 1` from before them."""
        return first == 0 or any(self.closed[first:last])

    def of_rank(self, rank: int) -> list[int]:
        """The links that a rank holds."""
        return [link for link, owner in enumerate(self.ranks) if owner == rank]

    def passed(self, rank: int) -> list[int]:
        """The links through which something passes on its way to this rank."""
        asking = [link for link in self.of_rank(rank) if self.asks(link)]
        return sorted({passed for link in asking for passed in range(self.starts[link] + 1, link)})


@dataclass(frozen=True)
class Schedule:
    """The messages of a scan, by step. Messages between two ranks are sent and received in this order."""

    links: Links
    messages: tuple[Message, ...]
    _of_rank: dict[int, list[Message]] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(links: Links, messages: Iterable[Message]) -> Schedule:
        """What of these messages has a way to go, in order."""
        travelling = [m for m in messages if m.source != m.target and links.size > 1]
        return Schedule(links, tuple(sorted(travelling, key=lambda m: m.step)))

    def check(self, scan: str) -> None:
        """Raises ValueError where a rank would have to send, or needs in the end, what nobody has told it by then: the
        same on every rank, before any data moves."""
        everyone = _Told()
        told = [_Told(everyone) for _ in range(self.links.size)]
        for link, rank in enumerate(self.links.ranks):
            told[rank].add(Message(-1, rank, rank, link, link + 1))
        for message in self.messages:
            (everyone if message.target == EVERYONE else told[message.target]).add(message)
        needs = [(m.source, m) for m in self.messages]
        asking = ((link, rank) for link, rank in enumerate(self.links.ranks) if self.links.asks(link))
        end = self.messages[-1].step + 1 if self.messages else 0
        needs += [(rank, Message(end, rank, rank, self.links.starts[link], link)) for link, rank in asking]
        for rank, need in needs:
            if not told[rank].covers(need):
                raise ValueError(
                    f"scan {scan!r}: rank {rank} needs in step {need.step} what links {need.first} to {need.last - 1} "
                    "do together, and by then it holds and was told of too few of them"
                )

    @cached_property
    def steps(self) -> int:
        """How many messages wait for one another at most."""
        return len({m.step for m in self.messages})

    def of_rank(self, rank: int) -> list[Message]:
        """What a rank takes part in."""
        if rank not in self._of_rank:
            self._of_rank[rank] = [m for m in self.messages if rank in (m.source, m.target) or m.target == EVERYONE]
        return self._of_rank[rank]

    def to(self, rank: int) -> list[Message]:
        """What a rank receives."""
        return [m for m in self.of_rank(rank) if m.source != rank]

    def from_(self, rank: int) -> list[Message]:
        """What a rank sends."""
        return [m for m in self.of_rank(rank) if m.source == rank]

    def received(self, rank: int, sizes: Sizes) -> int:
        """Bytes that a rank receives."""
        return sum(map(sizes.of, self.to(rank)))

    def sent(self, rank: int, sizes: Sizes) -> int:
        """Bytes that a rank sends; to everyone counts once, as a collective passes it on."""
        return sum(map(sizes.of, self.from_(rank)))

    def after(self, there: Schedule) -> Schedule:
        """This way back without the transfers of single links that the scan forward has told their receivers."""
        told = {(m.first, m.target) for m in there.messages if m.maps and m.last - m.first == 1}
        last = len(self.links.ranks) - 1
        messages = (
            m._replace(maps=False) if m.last - m.first == 1 and (last - m.first, m.target) in told else m
            for m in self.messages
        )
        return Schedule(self.links, tuple(messages))

    def missing(self, rank: int) -> list[int]:
        """The links whose states a rank is sent and uses, and whose transfers it has to know."""
        passed = self.links.passed(rank)
        alone = [m for m in self.to(rank) if not m.maps and not self.links.is_state(m.first, m.last)]
        return sorted(m.first for m in alone if m.target == rank or m.first in passed)


class _Told:
    """The stretches of links that one rank knows of, beside those that everyone does."""

    def __init__(self, everyone: _Told | None = None) -> None:
        self._everyone = everyone
        self._steps: dict[int, dict[int, dict[tuple[int, int], int]]] = defaultdict(lambda: defaultdict(dict))

    def add(self, message: Message) -> None:
        self._steps[message.first][message.last].setdefault((message.block, message.blocks), message.step)

    def covers(self, need: Message) -> bool:
        """Whether stretches that are known ahead of its step, laid end to end, make up a message's."""
        ways, seen = [need.first], set()
        while ways:
            link = ways.pop()
            if link == need.last:
                return True
            if link not in seen:
                seen.add(link)
                ways += self._ends(link, need)
        return False

    def _ends(self, link: int, need: Message) -> list[int]:
        """Where known stretches end that begin with a link."""
        own = [last for last, blocks in self._steps.get(link, {}).items() if last <= need.last and _has(blocks, need)]
        return own if self._everyone is None else own + self._everyone._ends(link, need)


def _has(blocks: dict[tuple[int, int], int], need: Message) -> bool:
    """Whether a whole, the block asked for, or all blocks of a whole are known in time."""
    known = {block for block, step in blocks.items() if step < need.step}
    if (0, 1) in known or (need.block, need.blocks) in known:
        return True
    return need.blocks == 1 and any(len([b for b in known if b[1] == count]) == count for _, count in known)
