"""Exclusive scans of Segments over ranks: how a rank learns the state that enters each of its links.

    gather  every rank gathers all maps and folds those before its own: one message (LASP-2, arXiv:2502.07563)
    ring    the folded state travels from link to link: one hop each (LASP-1, arXiv:2404.02882)

A scan is started as soon as a rank knows its own maps, runs while the rank computes, and is awaited with `wait()`. In
reverse it carries gradients from the last link to the first. Maps are those of whole links; `parallel/linear.py` makes
them from the maps of runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from lasp.kernels.arguments import check_choice
from lasp.kernels.segment import Segment, apply, transpose
from lasp.parallel import collectives
from lasp.parallel.group import SequenceGroup
from lasp.parallel.layout import Link, Plan

ScanName = Literal["auto", "gather", "ring"]
SCANS: tuple[ScanName, ...] = get_args(ScanName)


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


class Scan(Protocol):
    """A scan in flight."""

    def wait(self) -> list[Tensor | None]:
        """What enters each of this rank's links, by place; None where nothing does."""
        ...


def check_scan(name: str) -> str:
    """The scan that `name` stands for; ValueError when there is none."""
    check_choice("scan", name, SCANS)
    return "gather" if name == "auto" else name


def start_scan(
    name: str,
    links: list[Segment],
    plan: Plan,
    group: SequenceGroup | None,
    direction: Direction,
    transfers: Transfers,
) -> Scan:
    """Start a scan over the maps of this rank's links. Without a group the links are folded on the spot."""
    if group is None or group.size == 1:
        return _Local(links, plan, direction)
    return (_Gather if name == "gather" else _Ring)(links, plan, group, direction, transfers)


class Transfers:
    """The transfers A of all links, known from the plan or gathered once in the forward scan.

    rule: gives a link's transfer from its number of tokens; None for gates that only its own rank knows.
    """

    def __init__(self, rule: Callable[[int], Tensor] | None) -> None:
        self._rule = rule
        self._gathered: dict[Link, Tensor] = {}

    @property
    def must_travel(self) -> bool:
        return self._rule is None and not self._gathered

    def keep(self, link: Link, transfer: Tensor) -> None:
        self._gathered[link] = transfer.clone()  # not a view: that would keep the whole message until backward

    def of(self, link: Link) -> Tensor:
        return self._gathered[link] if self._rule is None else self._rule(link.length)


def _pass(link: Link, transfer: Tensor, state: Tensor, carry: Tensor | None) -> Tensor:
    """What leaves a link: `A·carry + state`, where a document that begins in the link lets nothing through."""
    return state if link.reset or carry is None else apply(transfer, carry) + state


class _Local:
    """All links are here."""

    def __init__(self, links: list[Segment], plan: Plan, direction: Direction) -> None:
        self._incoming: list[Tensor | None] = [None] * len(links)
        carry = None
        for link in direction.links(plan):
            self._incoming[link.place] = carry
            own = links[link.place]
            carry = _pass(link, own.transfer, own.state, carry)

    def wait(self) -> list[Tensor | None]:
        return self._incoming


class _Gather:
    """One all-gather of the states of all links, and of their transfers where the plan does not tell them."""

    def __init__(
        self, links: list[Segment], plan: Plan, group: SequenceGroup, direction: Direction, transfers: Transfers
    ) -> None:
        self._plan, self._direction, self._transfers = plan, direction, transfers
        parts = [link.state for link in links]
        if transfers.must_travel:
            parts += [link.transfer for link in links]
        self._shapes = [part.shape for part in parts]
        message = torch.cat([part.flatten() for part in parts])
        self._pending = collectives.all_gather(message, group.process_group, direction.phase)

    def wait(self) -> list[Tensor | None]:
        ranks = [self._unpack(row) for row in self._pending.wait()]
        links = self._direction.links(self._plan)
        if self._transfers.must_travel:
            for link in links:
                self._transfers.keep(link, ranks[link.rank][len(self._plan.own_links) + link.place])
        incoming: list[Tensor | None] = [None] * len(self._plan.own_links)
        carry, left = None, len(incoming)
        for link in links:
            if link.rank == self._plan.rank:
                incoming[link.place], left = carry, left - 1
            if not left:
                break  # what comes after this rank's last link is for others
            transfer = self._transfers.of(link)
            if self._direction.reverse:
                transfer = transpose(transfer)
            carry = _pass(link, transfer, ranks[link.rank][link.place], carry)
        return incoming

    def _unpack(self, row: Tensor) -> list[Tensor]:
        parts = row.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


class _Ring:
    """The folded state hops from the owner of a link to the owner of the next. Transfers never travel."""

    def __init__(
        self, links: list[Segment], plan: Plan, group: SequenceGroup, direction: Direction, transfers: Transfers
    ) -> None:
        self._own, self._group = links, group
        chain = direction.links(plan)
        steps = [(before, link) for before, link in pairwise(chain) if before.rank != link.rank]
        self._source = {link: before.rank for before, link in steps if link.rank == plan.rank}
        received = sum(links[link.place].state.nbytes for link in self._source)
        collectives.record("ring", direction.phase, received, len(steps))
        self._next = dict(pairwise(chain))
        self._todo = [link for link in chain if link.rank == plan.rank]
        self._incoming: list[Tensor | None] = [None] * len(links)
        self._here: Tensor | None = None  # the state that left this rank's previous link, if the next one is here too
        self._sent: list[collectives.Pending] = []
        self._arriving: collectives.Pending | None = None
        # What does not depend on an arrival leaves at once, and the first arrival is expected from now on.
        while self._todo and self._todo[0] not in self._source:
            self._advance()
        self._expect()

    def wait(self) -> list[Tensor | None]:
        while self._todo:
            self._advance()
            self._expect()
        for message in self._sent:
            message.wait()
        return self._incoming

    def _expect(self) -> None:
        """Post the receive of the next link. No earlier: on NCCL it would hold up the sends to the same rank."""
        link = self._todo[0] if self._todo else None
        if link in self._source:
            like = self._own[link.place].state
            self._arriving = collectives.receive(like, self._source[link], self._group.process_group, link.order)

    def _advance(self) -> None:
        """Take the next of this rank's links: receive, apply its map, pass on."""
        link = self._todo.pop(0)
        carry = self._arriving.wait() if self._arriving is not None else self._here
        self._incoming[link.place], self._here, self._arriving = carry, None, None
        if link not in self._next:
            return
        after, own = self._next[link], self._own[link.place]
        leaving = _pass(link, own.transfer, own.state, carry)
        if after.rank == link.rank:
            self._here = leaving
        else:
            self._sent.append(collectives.send(leaving, after.rank, self._group.process_group, after.order))
