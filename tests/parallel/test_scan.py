"""Scans over ranks that are threads, against the fold of all maps; which scans there are, and what reaches a rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from queue import Queue
from threading import Barrier
from types import SimpleNamespace
from typing import Any, TypeVar, get_args

import pytest
import torch
from torch import Tensor

from lasp.kernels.logcumsumexp import LogSum
from lasp.kernels.segment import Segment
from lasp.parallel import collectives
from lasp.parallel.collectives import Pending
from lasp.parallel.layout import Link, Plan
from lasp.parallel.monoid import Affine, LogSums
from lasp.parallel.scan import BACKWARD, FORWARD, SCANS, Scan, ScanName, check_scan, later_links, passed_links

T = TypeVar("T")

CONTIGUOUS, ZIGZAG = (0, 1, 2, 3), (0, 1, 2, 2, 1, 0)
SHAPES = {"per head": (2, 1, 1), "per channel": (2, 4, 1), "dense": (2, 4, 4)}


def plan_of(owners: tuple[int, ...], resets: tuple[bool, ...], rank: int) -> Plan:
    """Links of 5 tokens, whose owners and resets are given in their order."""
    links = [
        Link(0, order, owner, owners[:order].count(owner), 5, reset)
        for order, (owner, reset) in enumerate(zip(owners, resets, strict=True))
    ]
    return Plan(rank, (), tuple(links), 1 + sum(resets))


class Wires:
    """What the ranks, each of them a thread, hand to one another."""

    def __init__(self, ranks: int) -> None:
        self.barrier, self.rows = Barrier(ranks, timeout=20), [torch.empty(0)] * ranks
        self.messages: dict[Any, Queue[Tensor]] = defaultdict(Queue)

    def all_gather(self, tensor: Tensor, rank: int) -> Tensor:
        self.rows[rank] = tensor
        self.barrier.wait()
        rows = torch.stack(self.rows)
        self.barrier.wait()
        return rows


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[int, Any], T]], list[T]]:
    """Run a function of a rank and its group on so many ranks."""

    def run(ranks: int, function: Callable[[int, Any], T]) -> list[T]:
        wires = Wires(ranks)

        def receive(like: Tensor, source: int, rank: int, tag: int) -> Pending[Tensor]:
            result = torch.empty_like(like)
            arrive = lambda: result.copy_(wires.messages[source, rank, tag].get(timeout=20))  # noqa: E731
            return Pending([SimpleNamespace(wait=arrive)], result)

        def send(tensor: Tensor, to: int, rank: int, tag: int) -> Pending[Tensor]:
            wires.messages[rank, to, tag].put(tensor.clone())
            return Pending([], tensor)

        def all_gather(tensor: Tensor, rank: int, phase: str) -> Pending[Tensor]:
            return Pending([], wires.all_gather(tensor, rank))

        for fake in (receive, send, all_gather):
            monkeypatch.setattr(collectives, fake.__name__, fake)
        with ThreadPoolExecutor(ranks) as pool:
            groups = [SimpleNamespace(process_group=rank) for rank in range(ranks)]
            return list(pool.map(function, range(ranks), groups))

    return run


def folded(maps: list[Any], resets: tuple[bool, ...]) -> list[Tensor | None]:
    """What enters each link."""
    states: list[Tensor | None] = [None]
    for own, reset in zip(maps[:-1], resets[:-1], strict=True):
        states.append(own.state if reset or states[-1] is None else own(states[-1]))
    return states


def close(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for one, two in zip(found, expected, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("owners", [(0, 1), CONTIGUOUS, ZIGZAG, tuple(range(9))], ids=str)
@pytest.mark.parametrize("kind", [*SHAPES, "known", "log sums"])
def test_both_ways(run: Any, scan: str, owners: tuple[int, ...], kind: str) -> None:
    """Where a document begins nobody reads a transfer, NaN here; sums have the derivatives of their maps."""
    rng = torch.Generator().manual_seed(0)
    for _ in range(4):
        resets = tuple((torch.rand(len(owners), generator=rng) < 0.3).tolist())
        shape = SHAPES.get(kind, (2, 4, 1))
        states, grads = torch.randn(2, len(owners), 2, 4, 1 if kind == "log sums" else 3, generator=rng).double()
        transfers = torch.rand(len(owners), *shape, generator=rng).double()
        transfers[list(resets)] = torch.nan
        maps: list[Any] = [Segment(a, u) for a, u in zip(transfers, states, strict=True)]
        monoid: Any = Affine((lambda link, a=transfers: a[link.order]) if kind == "known" else None)
        if kind == "log sums":
            maps, monoid = [LogSum(u) for u in states], LogSums()
        entering = folded(maps, resets)
        if kind == "log sums":
            ratios = [None if z is None else (z - own(z)).exp() for z, own in zip(entering, maps, strict=True)]
            transfers = torch.stack([torch.full((2, 4, 1), torch.nan).double() if r is None else r for r in ratios])
        back = [Segment(a if kind != "dense" else a.mT, u) for a, u in zip(transfers, grads, strict=True)]
        backwards = folded(back[::-1], resets[::-1])[::-1]

        def both(rank: int, group: Any, given: Any = (resets, maps, monoid, back)) -> Any:
            resets, maps, monoid, back = given
            plan = plan_of(owners, resets, rank)
            own, there = [link.order for link in plan.own_links], SCANS[scan](plan, group, keeps=True)
            arrived, kept = there.start([maps[i] for i in own], monoid).wait()
            again = there.start_back([back[i] for i in own], monoid, kept).wait()
            return own, arrived, again.states

        for own, arrived, returned in run(max(owners) + 1, both):
            close(arrived, [entering[i] for i in own])
            close(returned, [backwards[i] for i in own])


def test_every_name_has_a_class() -> None:
    assert get_args(ScanName) == ("auto", *SCANS), "ScanName is what editors complete"
    assert [check_scan(name) for name in SCANS] == list(SCANS)
    assert check_scan("auto") in SCANS
    with pytest.raises(ValueError, match=f"scan must be one of auto, {', '.join(SCANS)}"):
        check_scan("star")


def test_a_scan_without_steps_cannot_be_made() -> None:
    class Unfinished(Scan):
        pass

    with pytest.raises(TypeError, match="steps"):
        Unfinished(plan_of((0, 1), (True, False), 0), None, True)


@pytest.mark.parametrize("owners", [CONTIGUOUS, ZIGZAG], ids=["contiguous", "zigzag"])
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_what_passes_on_its_way_to_a_rank(owners: tuple[int, ...], direction: Any) -> None:
    """A link ahead of one of the rank's, behind another, if no document begins from there on."""
    for resets in product((False, True), repeat=len(owners)):
        for rank in set(owners):
            plan = plan_of(owners, resets, rank)
            chain = direction.links(plan)
            expected = {
                chain[i]
                for own in range(len(chain))
                for i in range(1, own)
                if chain[own].rank == rank and not any(link.reset for link in chain[i:own])
            }
            assert set(passed_links(plan, direction)) == expected
            if direction.reverse:
                assert later_links(plan) == [link for link in plan.links if link in expected and link.rank != rank]
