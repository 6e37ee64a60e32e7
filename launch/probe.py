"""Latency and bandwidth between the ranks of a group, measured while all of them are at it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lasp.parallel import collectives
from lasp.parallel.collectives import Message
from lasp.parallel.group import SequenceGroup
from lasp.parallel.wires import Wire

CPU = torch.device("cpu")
SHORT, LONG = 1 << 10, 8 << 20
"""Bytes of the messages whose time is latency, and bandwidth."""


def probe(group: SequenceGroup, device: torch.device = CPU, repeat: int = 9) -> Wire:
    """The wire from each rank to the next, the same on every rank of the group, which call this together.

    device: what sends. Latency is a short message's way round all ranks, by their number; bandwidth that of a long one
    which every rank sends to the next while it receives another; a hop what a gather of short ones takes for each
    further rank: medians, of the slowest rank.
    """
    short, long = (torch.zeros(size, dtype=torch.uint8, device=device) for size in (SHORT, LONG))
    work = (lambda: _go_round(group, short), lambda: _shift(group, long), lambda: _gather(group, short))
    rounds, taken, gathered = (_slowest(group, run, device, repeat) for run in work)
    latency = rounds / group.size
    return Wire(latency, LONG / max(taken - latency, 1e-9), gathered / max(group.size - 1, 1))


def _go_round(group: SequenceGroup, message: Tensor) -> None:
    following, before, ranks = (group.rank + 1) % group.size, (group.rank - 1) % group.size, group.process_group
    if group.rank == 0:
        collectives.send(message, following, ranks, 0).wait()
    arrived = collectives.receive(message, before, ranks, 0).wait()
    if group.rank:
        collectives.send(arrived, following, ranks, 0).wait()


def _shift(group: SequenceGroup, message: Tensor) -> None:
    following, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    buffer = torch.empty_like(message)
    outgoing, incoming = [Message(message, following, 0)], [Message(buffer, before, 0)]
    collectives.rotate(outgoing, incoming, group.process_group, buffer).wait()


def _gather(group: SequenceGroup, message: Tensor) -> None:
    collectives.all_gather(message, group.process_group, "control").wait()


def _slowest(group: SequenceGroup, run: Callable[[], None], device: torch.device, repeat: int) -> float:
    """Median seconds of the slowest rank."""
    times = []
    for _ in range(repeat + 1):
        collectives.barrier(group.control)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    own = torch.tensor(statistics.median(times[1:]), dtype=torch.float64)
    return float(collectives.all_gather(own, group.control, "control").wait().max())
