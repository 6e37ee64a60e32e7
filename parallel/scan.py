"""Scans over ranks: how every rank learns the state that enters its links. Each is a schedule of messages, integers.

    gather     every rank gathers all maps, and folds those before its own (LASP-2, arXiv:2502.07563)
    ring       the folded state hops from link to link (LASP-1, arXiv:2404.02882)
    pipeline   the same in blocks, one behind the other (All-Scan of ZeCO, arXiv:2507.01004)
    doubling   maps of 1, 2, 4, ... links, over distances of as many (Hillis and Steele, 1986)
    two_level  a gather inside each node, and between nodes a ring in which every rank of a node carries its block

A scan says which stretch of links every message speaks of; how the sender puts it together of what it knows by then,
and the receiver what enters its links, is the executor's work (`exchange.py`). The same schedule function serves
gradients, which meet the links in reverse. What a scan costs is in docs/architecture.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import groupby, pairwise, product
from typing import ClassVar, Literal

import torch

from lasp.kernels.arguments import check_choice, check_integer
from lasp.kernels.chunks import ceil_div
from lasp.parallel.group import SequenceGroup
from lasp.parallel.remembered import remembered
from lasp.parallel.schedule import EVERYONE, Links, Message, Schedule, Sizes
from lasp.parallel.wires import Wires


@dataclass(frozen=True)
class Scan(ABC):
    """How the ranks of a call share their maps: a value, with the options of its kind. It holds no tensors.

    op: under which name the ledger counts it. remembers: whether the way back relies on transfers that the same scan
    forward has told, which autograd then saves. wire: the dtype in which states travel, by default their own.
    """

    name: ClassVar[str]
    wire: ClassVar[torch.dtype | None] = None

    @property
    def op(self) -> str:
        return self.name

    @property
    def remembers(self) -> bool:
        return False

    def check(self, ranks: int, node_size: int | None) -> None:  # noqa: B027  # most scans take any
        """Raises ValueError for so many ranks, of which so many neighbours share a node (None: they lie otherwise)."""

    @abstractmethod
    def messages(self, links: Links) -> Iterable[Message]:
        """What is sent. A message from a rank to itself goes without saying."""

    def fitted(self, links: Links, sizes: Sizes, wires: Wires) -> Scan:
        """With every option that follows from the links, the bytes and the wires; the same on every rank."""
        return self

    def schedule(self, links: Links) -> Schedule:
        """The messages that travel."""
        return _schedule(self, links)

    def schedule_back(self, back: Links, there: Links) -> Schedule:
        """Those of the way back, without the transfers that the way there has told where these are remembered."""
        return _schedule_back(self, back, there) if self.remembers else self.schedule(back)

    def __str__(self) -> str:
        given = [(field.name, getattr(self, field.name)) for field in fields(self)]
        options = ", ".join(f"{name}={value}" for name, value in given if value is not None)
        return f"{self.name}({options})" if options else self.name


@remembered
def _schedule(scan: Scan, links: Links) -> Schedule:
    schedule = Schedule.of(links, scan.messages(links))
    schedule.check(str(scan))
    return schedule


@remembered
def _schedule_back(scan: Scan, back: Links, there: Links) -> Schedule:
    return scan.schedule(back).after(scan.schedule(there))


@dataclass(frozen=True)
class Gather(Scan):
    """One all-gather of all links' maps. Transfers are sent forward only; each rank keeps those of later links.

    chunk_ranks: how many ranks' maps arrive at once, to be folded before the next ones are asked for: two such chunks
    are in memory, and not the maps of all ranks, nor are transfers kept. wire: bfloat16 halves what states take, each
    rounded once (2e-3 of a state, on any number of ranks); transfers travel as they are.
    """

    name = "gather"
    chunk_ranks: int | None = None
    wire: torch.dtype | None = None  # type: ignore[misc]  # an option here

    def __post_init__(self) -> None:
        if self.chunk_ranks is not None:
            check_integer("chunk_ranks", self.chunk_ranks, 1)
        if self.wire not in (None, torch.bfloat16):
            raise ValueError(f"states travel in their own dtype (wire=None) or in torch.bfloat16, got {self.wire}")

    @property
    def op(self) -> str:
        return "all_gather"

    @property
    def remembers(self) -> bool:
        return self.chunk_ranks is None

    def messages(self, links: Links) -> Iterator[Message]:
        owners = links.ranks
        chunk = len(owners) if self.chunk_ranks is None else self.chunk_ranks * ceil_div(len(owners), links.size)
        if any(links.asks(i) and {*owners[links.starts[i] : i]} != {owners[i]} for i in range(len(owners))):
            for i, rank in enumerate(owners):
                yield Message(i // chunk, rank, EVERYONE, i, i + 1, maps=True)


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

    def __post_init__(self) -> None:
        if self.blocks is not None:
            check_integer("blocks", self.blocks, 1)

    def fitted(self, links: Links, sizes: Sizes, wires: Wires) -> Pipeline:
        """As many blocks as let the last arrive first, by the overheads of wires."""
        return Pipeline(max(1, min(self.blocks or _best_blocks(links, sizes, wires), sizes.rows)))

    def messages(self, links: Links) -> Iterator[Message]:
        return _hops(links, self.blocks or 1)


@remembered
def _best_blocks(links: Links, sizes: Sizes, wires: Wires) -> int:
    """Where every block of n takes a slowest hop's overhead and an n-th of a state's way, `hops + n - 1` of them take
    least for n² = (hops - 1)·way / overhead, but for blocks of whole rows."""
    ring = Ring().schedule(links)
    hops = {wires.between(m.source, m.target, links.node_size) for m in ring.messages}
    overhead, way = max(((w.overhead, sizes.state / w.bandwidth) for w in hops), key=sum, default=(0.0, 0.0))
    if ring.steps < 2:
        return 1
    best = max(1, int(math.sqrt((ring.steps - 1) * way / max(overhead, 1e-9))))
    lengths = {ceil_div(sizes.rows, best), ceil_div(sizes.rows, best + 1), max(1, sizes.rows // (best + 1))}
    taken = {ceil_div(sizes.rows, n): overhead + way * n / sizes.rows for n in sorted(lengths)}
    return min(taken, key=lambda blocks: (ring.steps + blocks - 1) * taken[blocks])


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


@dataclass(frozen=True)
class TwoLevel(Scan):
    """Every rank is told the maps of its node, and what enters the node hops from node to node: each rank of a node
    passes its block to the same one of the next node, and shows it to its neighbours.

    node_size: how many consecutive ranks are a node; as the group's ranks lie on hosts if None.
    """

    name = "two_level"
    node_size: int | None = None

    def __post_init__(self) -> None:
        if self.node_size is not None:
            check_integer("node_size", self.node_size, 1)

    @property
    def remembers(self) -> bool:
        return True

    def check(self, ranks: int, node_size: int | None) -> None:
        size = self.node_size or node_size
        if size is None:
            raise ValueError("scan 'two_level' takes equal nodes of consecutive ranks, and the group's lie otherwise")
        if ranks % size:
            raise ValueError(f"scan 'two_level' takes equal nodes: {ranks} ranks do not divide into nodes of {size}")

    def messages(self, links: Links) -> Iterator[Message]:
        size = self.node_size or links.node_size or 1
        stretches = groupby(range(len(links.ranks)), lambda link: links.ranks[link] // size)
        nodes = [(node, list(own)) for node, own in stretches]
        yield from _inside_nodes(links, nodes, size)
        yield from _between_nodes(links, nodes, size)


Nodes = list[tuple[int, list[int]]]  # each node with consecutive links of its ranks; zigzag meets most of them twice


def _inside_nodes(links: Links, nodes: Nodes, size: int) -> Iterator[Message]:
    """Every link's map to the ranks of its node that have later links, and to all of them if the node passes it on."""
    for (node, own), (_, following) in zip(nodes, [*nodes[1:], (-1, [])], strict=True):
        passed_on = links.starts[following[0]] if following and links.asks(following[0]) else len(links.ranks)
        for link, rank in product(own, range(node * size, (node + 1) * size)):
            later = any(links.asks(i) and links.starts[i] <= link < i for i in own if links.ranks[i] == rank)
            if later or passed_on <= link:
                yield Message(0, links.ranks[link], rank, link, link + 1, maps=not links.is_state(link, link + 1))


def _between_nodes(links: Links, nodes: Nodes, size: int) -> Iterator[Message]:
    """What enters a node, each block from a rank to the same one of the next node, and then to all ranks there."""
    hop = 0
    for (source, before), (target, own) in pairwise(nodes):
        start, link = links.starts[own[0]], own[0]
        hop = hop + 1 if start < before[0] else 1  # it waits for what entered the node before, or not
        if links.asks(link):
            for block in range(size):
                here = target * size + block
                yield Message(hop, source * size + block, here, start, link, block=block, blocks=size)
                for rank in range(target * size, (target + 1) * size):
                    yield Message(hop + 1, here, rank, start, link, block=block, blocks=size)


SCANS: dict[str, type[Scan]] = {scan.name: scan for scan in (Gather, Ring, Doubling, Pipeline, TwoLevel)}


@dataclass(frozen=True)
class Heads(Gather):
    """No scan: ranks exchange tokens for heads, and each runs some heads over the whole sequence (`parallel/heads.py`).

    What has no heads, a running log-sum-exp, is gathered.
    """

    name = "heads"


@dataclass(frozen=True)
class Auto(Scan):
    """The one that the cost model finds cheapest for the links and states of a call (`parallel/cost.py`)."""

    name = "auto"

    def messages(self, links: Links) -> Iterable[Message]:
        raise AssertionError("a scan is chosen before it runs")


ScanName = Literal["auto", "gather", "ring", "doubling", "pipeline", "two_level", "heads"]  # what editors complete


def check_scan(scan: str | Scan, group: SequenceGroup | None = None) -> Scan:
    """The scan that a name stands for. Raises ValueError where there is none, or it is none for this group."""
    if not isinstance(scan, Scan):
        check_choice("scan", scan, (Auto.name, *SCANS, Heads.name))
        scan = (SCANS | {Auto.name: Auto, Heads.name: Heads})[scan]()
    if group is not None:
        scan.check(group.size, group.node_size)
    return scan
