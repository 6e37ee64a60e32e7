"""Scans over ranks that are threads, against the fold of all maps; which there are, and what their schedules say."""

from __future__ import annotations

import math
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import lasp
from lasp.kernels.logcumsumexp import LogSum
from lasp.kernels.segment import Segment
from lasp.launch.threads import run
from lasp.parallel import exchange as exchange_module
from lasp.parallel.exchange import Exchange, Flight
from lasp.parallel.group import node_size
from lasp.parallel.layout import Link, Plan, make_plan
from lasp.parallel.monoid import Affine, LogSums
from lasp.parallel.scan import SCANS, Auto, Doubling, Gather, Pipeline, Ring, Scan, ScanName, TwoLevel, check_scan
from lasp.parallel.schedule import EVERYONE, Links, Message, Schedule, Sizes
from lasp.parallel.wires import PROCESSES

CONTIGUOUS, ZIGZAG, EIGHT = (0, 1, 2, 3), (0, 1, 2, 2, 1, 0), tuple(range(8))
SHAPES = {"per head": (2, 1, 1), "per channel": (2, 4, 1), "dense": (2, 4, 4)}
# Every scan as its name gives it, and with options.
CHUNKED = [Gather(chunk_ranks=1), Gather(chunk_ranks=2)]
ALL = [*(kind() for kind in SCANS.values()), Pipeline(3), Pipeline(7), *CHUNKED]


def plan_of(
    owners: tuple[int, ...], resets: tuple[bool, ...], rank: int, at_start: tuple[bool, ...] | None = None
) -> Plan:
    """Links of 5 tokens, whose owners are given in their order. Documents begin in those that are `resets`, and with
    the first token of those that are `at_start`."""
    opens = (False,) * len(owners) if at_start is None else at_start
    links = [
        Link(0, i, owner, owners[:i].count(owner), 5, resets[i] or opens[i], opens[i], (*opens, False)[i + 1])
        for i, owner in enumerate(owners)
    ]
    return Plan(rank, (), tuple(links), 1 + sum(resets) + sum(opens))


def folded(maps: list[Any], closed: Iterable[bool], fresh: Iterable[bool]) -> list[Tensor | None]:
    """What enters each link that has a use for it."""
    states: list[Tensor | None] = []
    state: Tensor | None = None
    for own, is_closed, is_fresh in zip(maps, closed, fresh, strict=True):
        states.append(None if is_fresh else state)
        state = own.state if is_closed or state is None else own(state)
    return states


def close(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for one, two in zip(found, expected, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def nodes(scan: Scan, ranks: int) -> list[Scan]:
    """A scan, with nodes of every size where it has them."""
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    return [TwoLevel(size) for size in sizes] if isinstance(scan, TwoLevel) else [scan]


@pytest.mark.parametrize("scan", ALL, ids=str)
@pytest.mark.parametrize(
    ("owners", "kind"),
    [
        *product([(0, 1), CONTIGUOUS, ZIGZAG], ["per channel", "dense", "log sums"]),
        *product([CONTIGUOUS], ["per head", "known"]),
        *product([EIGHT, (*EIGHT, *EIGHT[::-1])], ["dense"]),
    ],
    ids=lambda x: x if isinstance(x, str) else len(x),
)
def test_both_ways(scan: Scan, owners: tuple[int, ...], kind: str) -> None:
    for one in nodes(scan, max(owners) + 1):
        both_ways(one, owners, kind)


def both_ways(scan: Scan, owners: tuple[int, ...], kind: str) -> None:
    """Where a document begins nobody reads a transfer, NaN here; sums have the derivatives of their maps. What crosses
    is what the schedule says."""
    rng = torch.Generator().manual_seed(0)
    for turn in range(3):
        resets, opens = (tuple((torch.rand(len(owners), generator=rng) < 0.1 * turn).tolist()) for _ in range(2))
        plans = [plan_of(owners, resets, rank, opens) for rank in range(max(owners) + 1)]
        there, back = (Links.of(plans[0], len(plans), reverse) for reverse in (False, True))
        shape = SHAPES.get(kind, (2, 4, 1))
        states, grads = torch.randn(2, len(owners), 2, 4, 1 if kind == "log sums" else 3, generator=rng).double()
        transfers = torch.rand(len(owners), *shape, generator=rng).double() / shape[-1]
        transfers[list(there.closed)] = torch.nan
        maps: list[Any] = [Segment(a, u) for a, u in zip(transfers, states, strict=True)]
        monoid: Any = Affine((lambda link, a=transfers: a[link.order]) if kind == "known" else None)
        if kind == "log sums":
            maps, monoid = [LogSum(u) for u in states], LogSums()
        entering = folded(maps, there.closed, there.fresh)
        if kind == "log sums":
            ratios = [None if z is None else (z - own(z)).exp() for z, own in zip(entering, maps, strict=True)]
            transfers = torch.stack([torch.full((2, 4, 1), torch.nan).double() if r is None else r for r in ratios])
        returned = [Segment(a if kind != "dense" else a.mT, u) for a, u in zip(transfers, grads, strict=True)]
        leaving = folded(returned[::-1], back.closed, back.fresh)[::-1]

        def both(group: lasp.SequenceGroup, given: Any = (plans, maps, monoid, returned)) -> Any:
            plans, maps, monoid, returned = given
            own = [link.order for link in plans[group.rank].own_links]
            exchange = Exchange(scan, plans[group.rank], group, keeps=True)
            arrived, kept = exchange.start([maps[i] for i in own], monoid).wait()
            again = exchange.start_back([returned[i] for i in own], monoid, kept).wait()
            return own, arrived, again.states

        for own, arrived, again in run(len(plans), both):
            close(arrived, [entering[i] for i in own])
            close(again, [leaving[i] for i in own])


@pytest.mark.parametrize("scan", [scan for scan in ALL if not isinstance(scan, Gather)], ids=str)
@pytest.mark.parametrize("owners", [CONTIGUOUS, ZIGZAG], ids=len)
def test_a_scan_gets_on_while_the_ranks_compute(scan: Scan, owners: tuple[int, ...]) -> None:
    """Every message is sent though no rank waits for any, and what a rank's thread ends with is told when it does."""
    plans = [plan_of(owners, (False,) * len(owners), rank) for rank in range(max(owners) + 1)]
    size = 2 if len(plans) % 2 == 0 else 1
    messages = scan.schedule(Links.of(plans[0], len(plans), node_size=size)).messages

    def work(group: lasp.SequenceGroup) -> bool:
        own = [Segment(torch.full((2, 8, 1), 0.5), torch.ones(2, 8, 3)) for _ in plans[group.rank].own_links]
        flight = Exchange(scan, plans[group.rank], group, keeps=False).start(own, Affine())
        deadline = time.monotonic() + 10
        while group.process_group.wires.sent < len(messages) and time.monotonic() < deadline:
            time.sleep(1e-3)
        on_its_way = group.process_group.wires.sent == len(messages)
        return on_its_way and all(state is None or state.isfinite().all() for state in flight.wait().states)

    assert all(run(len(plans), work, node_size=size))


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_a_gather_in_chunks_holds_two_of_them(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Of the maps of eight ranks that cross, on the way there and back; the whole gather holds those of all others."""
    living: dict[int, weakref.WeakSet[Any]] = defaultdict(weakref.WeakSet)
    most: Counter[int] = Counter()
    links = links_of(EIGHT)
    buffer = exchange_module._Rank._buffer

    def seen(rank: Any, message: Message) -> Tensor:
        made = buffer(rank, message)
        living[rank.rank].add(made.untyped_storage())
        most[rank.rank] = max(most[rank.rank], len(living[rank.rank]))
        return made

    monkeypatch.setattr(exchange_module._Rank, "_buffer", seen)

    def work(group: lasp.SequenceGroup) -> None:
        plan, own = plan_of(EIGHT, (False,) * 8, group.rank), Segment(torch.full((2, 4, 1), 0.5), torch.ones(2, 4, 3))
        exchange = Exchange(Gather(chunk_ranks=chunk), plan, group, keeps=True)
        assert exchange.start([own], Affine()).wait().kept is None
        exchange.start_back([own], Affine(), None).wait()

    run(8, work)
    assert Gather(chunk_ranks=chunk).schedule(links).steps == 8 // chunk
    assert 0 < max(most.values()) <= 2 * chunk + 1


def test_what_ends_a_scan_in_flight_is_raised_where_it_is_awaited() -> None:
    def steps() -> Any:
        yield True
        raise MemoryError("no more")

    flight = Flight(steps(), torch.zeros(1))
    with pytest.raises(MemoryError, match="no more"):
        flight.wait()


# Schedules ----------------------------------------------------------------------------------------------------------

SIZES = Sizes(state=1000, transfer=10, rows=10)


def links_of(owners: tuple[int, ...], *resets: int, opens: tuple[int, ...] = (), reverse: bool = False) -> Links:
    where = [tuple(i in marked for i in range(len(owners))) for marked in (resets, opens)]
    return Links.of(plan_of(owners, where[0], 0, where[1]), max(owners) + 1, reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 13, 64])
def test_what_each_scan_costs(ranks: int, reverse: bool) -> None:
    """Of a rank in the middle of one long document, the formulas of docs/architecture.md."""
    links, rank = links_of(tuple(range(ranks)), reverse=reverse), 0 if reverse else ranks - 1
    whole = {scan: SCANS[scan]().schedule(links) for scan in SCANS}
    log2 = math.ceil(math.log2(ranks))
    assert (whole["gather"].steps, whole["gather"].received(rank, SIZES)) == (1, (ranks - 1) * 1010)
    assert (whole["ring"].steps, whole["ring"].received(rank, SIZES)) == (ranks - 1, 1000)
    piped = Pipeline(5).schedule(links)
    assert (piped.steps, piped.received(rank, SIZES)) == (ranks - 1 + 5 - 1, 1000)
    # All but the last of its messages are maps; that one begins with the chain.
    assert (whole["doubling"].steps, whole["doubling"].received(rank, SIZES)) == (log2, log2 * 1010 - 10)


@pytest.mark.parametrize(("ranks", "size"), [(8, 2), (12, 4), (64, 8), (64, 1)])
def test_what_two_levels_cost(ranks: int, size: int) -> None:
    """Of a rank in the middle: the maps of its node, and one state, of which one block comes from another node."""
    there, back = (TwoLevel(size).schedule(links_of(tuple(range(ranks)), reverse=way)) for way in (False, True))
    nodes = ranks // size
    for way, transfer in ((there, 10), (back, 10), (back.after(there), 0)):
        assert way.steps == (nodes + 1 if size > 1 else nodes - 1)
        for rank in range(size, 2 * size):
            assert way.received(rank, SIZES) == (size - 1) * (1000 + transfer) + 1000
            across = [m for m in way.to(rank) if m.source // size != rank // size]
            assert sum(map(SIZES.of, across)) in (1000 // size, 1000 * -(-10 // size) // 10, 1000 * (10 // size) // 10)


@pytest.mark.parametrize("scan", ALL, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_documents_cut_schedules(scan: Scan, reverse: bool) -> None:
    """Two pairs of ranks, between which a document begins: none has a word for the other pair, but in collectives."""
    schedule = scan.schedule(links_of(CONTIGUOUS, opens=(2,), reverse=reverse))
    pairs = {(m.source // 2, m.target // 2) for m in schedule.messages if m.target != EVERYONE}
    assert pairs <= {(0, 0), (1, 1)}
    assert schedule.steps == {"pipeline": scan.blocks or 1}.get(scan.name, 1) if scan.name == "pipeline" else 1
    nothing = scan.schedule(links_of(CONTIGUOUS, opens=(0, 1, 2, 3), reverse=reverse))
    assert not nothing.messages


def test_a_document_that_begins_in_a_link_begins_anew() -> None:
    """Behind it hops start over, and a state in the place of a map is enough."""
    links = links_of(tuple(range(6)), 2)
    assert [(m.step, m.first, m.last) for m in Ring().schedule(links).messages] == [
        (0, 0, 1), (0, 2, 3), (1, 0, 2), (1, 2, 4), (2, 2, 5),
    ]  # fmt: skip
    assert [(m.step, m.first, m.last, m.maps) for m in Doubling().schedule(links).messages] == [
        (0, 0, 1, False), (0, 1, 2, True), (0, 2, 3, False), (0, 3, 4, True), (0, 4, 5, True),
        (1, 0, 1, False), (1, 2, 3, False), (1, 2, 4, False),
    ]  # fmt: skip


def test_nodes_are_equal_and_of_consecutive_ranks() -> None:
    for hosts, size in {"aabb": 2, "abcd": 1, "aaaa": 4, "a": 1, "aab": None, "abab": None}.items():
        assert node_size([ord(host) for host in hosts]) == size
    TwoLevel().check(8, 4)
    TwoLevel(2).check(8, None)
    with pytest.raises(ValueError, match="the group's lie otherwise"):
        TwoLevel().check(8, None)
    with pytest.raises(ValueError, match="8 ranks do not divide into nodes of 3"):
        TwoLevel(3).check(8, 4)


def test_the_pipeline_takes_no_more_blocks_than_rows() -> None:
    links = links_of(tuple(range(8)))
    assert Pipeline(64).fitted(links, SIZES, PROCESSES) == Pipeline(10)
    assert Pipeline().fitted(links, SIZES, PROCESSES) == Pipeline(1)
    assert Pipeline().fitted(links_of((0, 1)), Sizes(2**22, 0, 128), PROCESSES) == Pipeline(1), "one hop"
    blocks = [SIZES._replace(rows=4).of(Message(0, 0, 1, 0, 1, block=i, blocks=3)) for i in range(3)]
    assert blocks == [500, 250, 250]


def test_the_way_back_sends_what_the_way_there_did_not() -> None:
    """The way back sends no transfer that the way there has told, and every other."""
    there, back = (Gather().schedule(links_of(CONTIGUOUS, reverse=reverse)) for reverse in (False, True))
    assert {m.maps for m in there.messages} == {True}
    assert {m.maps for m in back.after(there).messages} == {False}
    there, back = (Doubling().schedule(links_of(CONTIGUOUS, reverse=reverse)) for reverse in (False, True))
    assert back.after(there) == back


def test_every_name_has_a_class() -> None:
    assert get_args(ScanName) == ("auto", *SCANS, "heads"), "ScanName is what editors complete"
    assert [check_scan(name) for name in SCANS] == [kind() for kind in SCANS.values()]
    assert check_scan("auto") == Auto()
    assert check_scan(Pipeline(3)) == Pipeline(3)
    assert [str(scan) for scan in (Ring(), Pipeline(), Pipeline(3))] == ["ring", "pipeline", "pipeline(blocks=3)"]
    for wrong in (lambda: Pipeline(0), lambda: Gather(chunk_ranks=0), lambda: TwoLevel(1.5)):
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            wrong()
    with pytest.raises(ValueError, match=r"or in torch\.bfloat16, got torch\.float16"):
        Gather(wire=torch.float16)
    with pytest.raises(ValueError, match=f"scan must be one of auto, {', '.join(SCANS)}"):
        check_scan("star")


def test_a_new_scan_is_one_class() -> None:
    @dataclass(frozen=True)
    class Star(Scan):
        """The first link's rank gathers nothing and tells everyone what enters its links."""

        name = "star"

        def messages(self, links: Links) -> Iterable[Message]:
            last = len(links.ranks)
            for link in range(1, last):
                for before in range(links.starts[link], link):
                    maps = not links.is_state(before, before + 1)
                    yield Message(0, links.ranks[before], links.ranks[link], before, before + 1, maps)

    class Unfinished(Scan):
        pass

    with pytest.raises(TypeError, match="messages"):
        Unfinished()
    both_ways(Star(), CONTIGUOUS, "dense")


@pytest.mark.parametrize("owners", [CONTIGUOUS, ZIGZAG], ids=["contiguous", "zigzag"])
@pytest.mark.parametrize("reverse", [False, True])
def test_what_passes_on_its_way_to_a_rank(owners: tuple[int, ...], reverse: bool) -> None:
    """A link ahead of one of the rank's, behind another, if no document begins from there on."""
    for resets in product((False, True), repeat=len(owners)):
        for rank in set(owners):
            links = Links.of(plan_of(owners, resets, rank), max(owners) + 1, reverse)
            expected = {
                i
                for own in range(len(owners))
                for i in range(1, own)
                if links.ranks[own] == rank and not any(links.closed[i:own])
            }
            assert set(links.passed(rank)) == expected


def test_what_documents_make_of_links() -> None:
    """The second link begins with a document, the third holds one, nothing ends or begins at the fourth."""
    plan = make_plan((4, 4, 4, 4), 0, bounds=(0, 4, 9, 11, 16))
    assert [link.opens for link in plan.links] == [True, True, False, False]
    assert [link.closes for link in plan.links] == [True, False, False, True]
    assert [link.reset for link in plan.links] == [True, True, True, False]


@pytest.mark.parametrize("lost", range(4))
def test_a_schedule_that_lacks_a_message_is_refused_by_all(lost: int) -> None:
    links = Links.of(make_plan((4,) * 4, 0, "contiguous", None), 4)
    whole = Doubling().schedule(links)
    lacking = Schedule(links, whole.messages[:lost] + whole.messages[lost + 1 :])
    target = whole.messages[lost].target
    with pytest.raises(ValueError, match=rf"scan 'doubling': rank {target} needs in step \d what links \d to \d do"):
        lacking.check("doubling")
