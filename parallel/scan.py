"""Exclusive scans of maps over ranks: how a rank learns the state that enters each of its links.

    gather  every rank gathers all maps and folds those before its own: one message (LASP-2, arXiv:2502.07563)
    ring    the folded state travels from link to link: one hop each (LASP-1, arXiv:2404.02882)

A scan is started as soon as a rank knows its own maps, runs while the rank computes, and is awaited. In reverse it
carries gradients from the last link to the first. Maps are those of whole links, of which kind the `Monoid` tells; the
makers of maps know runs. Where a document begins in a link (`link.reset`) nothing passes through it, whatever its map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lasp.kernels.arguments import check_choice
from lasp.kernels.segment import Segment
from lasp.parallel import collectives
from lasp.parallel.group import SequenceGroup
from lasp.parallel.layout import Link, Plan
from lasp.parallel.monoid import Map, Monoid, fold


@dataclass(frozen=True)
class Direction:
    """Which way a scan runs, and under which phase it is counted."""

    phase: str
    reverse: bool

    def links(self, plan: Plan) -> tuple[Link, ...]:
        """All links in the order in which the scan meets them."""
        return plan.links[::-1] if self.reverse else plan.links


FORWARD = Direction("forward", reverse=False)
BACKWARD = Direction("backward", reverse=True)


class Arrival(NamedTuple):
    """What a scan ends with.

    states: what enters each of this rank's links, by place; None where nothing does. kept: what the scan needs on its
    way back and nobody sends again, for autograd to save.
    """

    states: list[Tensor | None]
    kept: Tensor | None = None


class Flight:
    """A scan in flight: whatever its steps do ahead of their first `yield` is done when it is made."""

    def __init__(self, steps: Generator[None, None, Arrival]) -> None:
        self._arrival: Arrival | None = None
        self._steps = self._run(steps)
        next(self._steps, None)

    def wait(self) -> Arrival:
        """Take the remaining steps."""
        for _ in self._steps:
            pass
        assert self._arrival is not None, "steps end with an arrival"
        return self._arrival

    def _run(self, steps: Generator[None, None, Arrival]) -> Generator[None, None, None]:
        self._arrival = yield from steps


class Scan(ABC):
    """How the ranks of one call share their maps, on the way there and on the way back. It holds no tensors.

    keeps: whether there will be a way back.
    """

    def __init__(self, plan: Plan, group: SequenceGroup, keeps: bool) -> None:
        self.plan, self.group, self.keeps = plan, group, keeps

    def start(self, maps: Sequence[Map], monoid: Monoid, direction: Direction = FORWARD) -> Flight:
        """Start a scan over the maps of this rank's links, by place."""
        return Flight(self.steps(maps, monoid, direction))

    def start_back(self, maps: Sequence[Segment], monoid: Monoid, kept: Tensor | None) -> Flight:
        """Start the reverse scan over the maps of gradients, after one over maps of the given kind that `kept` this."""
        transfers = {} if kept is None else dict(zip(later_links(self.plan), kept, strict=True))
        return Flight(self.steps(maps, monoid.adjoint(transfers), BACKWARD))

    @abstractmethod
    def steps(self, maps: Sequence[Map], monoid: Monoid, direction: Direction) -> Generator[None, None, Arrival]:
        """Exchange, with a `yield` wherever this rank waits for others and had better compute."""


class Gather(Scan):
    """One all-gather of what there is to send of all maps. Transfers are sent forward only, and those of later links
    kept."""

    def steps(self, maps: Sequence[Map], monoid: Monoid, direction: Direction) -> Generator[None, None, Arrival]:
        packed = [monoid.pack(own) for own in maps]
        message = torch.cat([part.flatten() for parts in packed for part in parts])
        pending = collectives.all_gather(message, self.group.process_group, direction.phase)
        yield
        rank, shapes = self.plan.rank, [part.shape for part in packed[0]]
        rows = pending.wait().unflatten(1, (len(maps), message.numel() // len(maps)))
        sent = {link: _split(rows[link.rank, link.place], shapes) for link in direction.links(self.plan)}
        passed = {
            link: maps[link.place] if link.rank == rank else monoid.unpack(link, sent[link])
            for link in passed_links(self.plan, direction)
        }
        entering = {link.place: state for link, state in fold(sent, passed) if link.rank == rank}
        states = [entering[place] for place in range(len(maps))]
        if not self.keeps or direction.reverse:
            return Arrival(states)
        transfers = monoid.transfers(later_links(self.plan), sent)
        return Arrival(states, torch.stack(transfers) if transfers else None)  # copied: views would keep all messages


class Ring(Scan):
    """The folded state hops from the owner of a link to the owner of the next. Transfers never travel."""

    def steps(self, maps: Sequence[Map], monoid: Monoid, direction: Direction) -> Generator[None, None, Arrival]:
        chain, ranks = direction.links(self.plan), self.group.process_group
        hops = [(before, link) for before, link in pairwise(chain) if before.rank != link.rank]
        source = {link: before.rank for before, link in hops if link.rank == self.plan.rank}
        following = dict(pairwise(chain))
        collectives.record("ring", direction.phase, sum(maps[link.place].state.nbytes for link in source), len(hops))
        states: list[Tensor | None] = [None] * len(maps)
        here: Tensor | None = None  # what left this rank's previous link, if the next one is here too
        leaving: list[collectives.Pending[Tensor]] = []
        for link in chain:
            if link.rank != self.plan.rank:
                continue
            own, after = maps[link.place], following.get(link)
            if link in source:  # no earlier: on NCCL a posted receive holds up the sends to the same rank
                arriving = collectives.receive(own.state, source[link], ranks, link.order)
                yield
                here = arriving.wait()
            states[link.place] = here
            if after is None:
                break
            here = own.state if link.reset or here is None else own(here)
            if after.rank != link.rank:
                leaving.append(collectives.send(here, after.rank, ranks, after.order))
        yield
        for message in leaving:
            message.wait()
        return Arrival(states)


SCANS: dict[str, type[Scan]] = {"gather": Gather, "ring": Ring}
ScanName = Literal["auto", "gather", "ring"]  # what editors complete


def check_scan(name: str) -> str:
    """The scan that `name` stands for; ValueError when there is none."""
    check_choice("scan", name, ("auto", *SCANS))
    return "gather" if name == "auto" else name


def passed_links(plan: Plan, direction: Direction) -> list[Link]:
    """The links through which something passes on its way to this rank, from the last one that a scan meets."""
    found, wanted = [], False
    for link in reversed(direction.links(plan)[1:]):
        if wanted and not link.reset:
            found.append(link)
        wanted = link.rank == plan.rank or (wanted and not link.reset)
    return found


def later_links(plan: Plan) -> list[Link]:
    """The links of other ranks through which gradients come to this one, in order: what a scan keeps transfers of."""
    return [link for link in passed_links(plan, BACKWARD) if link.rank != plan.rank]


def _split(row: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = row.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


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
