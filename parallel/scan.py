"""Scans over ranks: how every rank learns the state that enters its links. Each is a schedule of messages, integers.

    gather     every rank gathers all maps, and folds those before its own (LASP-2, arXiv:2502.07563)
    ring       the folded state hops from link to link (LASP-1, arXiv:2404.02882)
    pipeline   the same in blocks, one behind the other (All-Scan of ZeCO, arXiv:2507.01004)
    doubling   maps of 1, 2, 4, ... links, over distances of as many (Hillis and Steele, 1986)

A scan says which stretch of links every message speaks of; how the sender puts it together of what it knows by then,
and the receiver what enters its links, is the executor's work (`exchange.py`). The same schedule function serves
gradients, which meet the links in reverse. What a scan costs is in docs/architecture.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from lasp.kernels.arguments import check_choice
from lasp.parallel.remembered import remembered
from lasp.parallel.schedule import EVERYONE, Links, Message, Schedule, Sizes


@dataclass(frozen=True)
class Scan(ABC):
    """How the ranks of a call share their maps: a value, with the options of its kind. It holds no tensors.

    op: under which name the ledger counts it. remembers: whether the way back relies on transfers that the same scan
    forward has told, which autograd then saves.
    """

    name: ClassVar[str]

    @property
    def op(self) -> str:
        return self.name

    @property
    def remembers(self) -> bool:
        return False

    @abstractmethod
    def messages(self, links: Links) -> Iterable[Message]:
        """What is sent. A message from a rank to itself goes without saying."""

    def fitted(self, links: Links, sizes: Sizes) -> Scan:
        """With every option that follows from the links and the bytes; the same on every rank."""
        return self

    def schedule(self, links: Links) -> Schedule:
        """The messages that travel."""
        return _schedule(self, links)

    def __str__(self) -> str:
        given = [(field.name, getattr(self, field.name)) for field in fields(self)]
        options = ", ".join(f"{name}={value}" for name, value in given if value is not None)
        return f"{self.name}({options})" if options else self.name


@remembered
def _schedule(scan: Scan, links: Links) -> Schedule:
    return Schedule.of(links, scan.messages(links))


@dataclass(frozen=True)
class Gather(Scan):
    """One all-gather of all links' maps. Transfers are sent forward only; each rank keeps those of later links."""

    name = "gather"

    @property
    def op(self) -> str:
        return "all_gather"

    @property
    def remembers(self) -> bool:
        return True

    def messages(self, links: Links) -> Iterator[Message]:
        owners = links.ranks
        if any(links.asks(i) and {*owners[links.starts[i] : i]} != {owners[i]} for i in range(len(owners))):
            for i, rank in enumerate(owners):
                yield Message(0, rank, EVERYONE, i, i + 1, maps=True)


@dataclass(frozen=True)
class Ring(Scan):
    """What enters a link hops from the one before it: states alone, one link after the other."""

    name = "ring"

    def messages(self, links: Links) -> Iterator[Message]:
        return _hops(links, 1)


@dataclass(frozen=True)
class Pipeline(Scan):
    """The ring in blocks, each of which is sent on when it has come. blocks: how many; by `fitted` if None.

    A block holds rows of the state where transfers are diagonal, and columns where they are dense, so that no two
    blocks have to meet.
    """

    name = "pipeline"
    blocks: int | None = None

    def fitted(self, links: Links, sizes: Sizes) -> Pipeline:
        """As many as make the last block arrive first, where a message costs as much as 256 KiB of its bytes."""
        hops = Ring().schedule(links).steps
        best = round(math.sqrt(max(hops - 1, 0) * sizes.state / 2**18)) if self.blocks is None else self.blocks
        return Pipeline(max(1, min(best, sizes.rows)))

    def messages(self, links: Links) -> Iterator[Message]:
        return _hops(links, self.blocks or 1)


def _hops(links: Links, blocks: int) -> Iterator[Message]:
    """What enters each link, from the owner of the one before: a hop waits for the one before it, block by block."""
    hop = 0
    for link in range(1, len(links.ranks)):
        start, source, target = links.starts[link], links.ranks[link - 1], links.ranks[link]
        if start == link - 1:
            hop = 0
        if links.asks(link):
            for block in range(blocks):
                yield Message(hop + block, source, target, start, link, block=block, blocks=blocks)
            hop += source != target


@dataclass(frozen=True)
class Doubling(Scan):
    """In every step a link is told of twice as many links before it as in the last: log2 of the links in all."""

    name = "doubling"

    def messages(self, links: Links) -> Iterator[Message]:
        step, reach = 0, 1
        while reach < len(links.ranks):
            for link in range(reach, len(links.ranks)):
                source, start = link - reach, links.starts[link]
                if links.asks(link) and start <= source:
                    first = max(start, source + 1 - reach)
                    maps = not links.is_state(first, source + 1)
                    yield Message(step, links.ranks[source], links.ranks[link], first, source + 1, maps)
            step, reach = step + 1, 2 * reach


SCANS: dict[str, type[Scan]] = {scan.name: scan for scan in (Gather, Ring, Doubling, Pipeline)}


@dataclass(frozen=True)
class Heads(Gather):
    """No scan: ranks exchange tokens for heads, and each runs some heads over the whole sequence (`parallel/heads.py`).

    What has no heads, a running log-sum-exp, is gathered.
    """

    name = "heads"


ScanName = Literal["auto", "gather", "ring", "doubling", "pipeline", "heads"]  # what editors complete


def check_scan(scan: str | Scan) -> Scan:
    """The scan that a name stands for; ValueError where there is none."""
    if isinstance(scan, Scan):
        return scan
    check_choice("scan", scan, ("auto", *SCANS, Heads.name))
    return Gather() if scan == "auto" else (SCANS | {Heads.name: Heads})[scan]()
