"""Latency and bandwidth between the ranks of a group, measured while all of them are at it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lasp.kernels.segment import Segment
from lasp.parallel import collectives
from lasp.parallel.collectives import Message
from lasp.parallel.exchange import Exchange
from lasp.parallel.group import SequenceGroup
from lasp.parallel.layout import make_plan
from lasp.parallel.monoid import Affine
from lasp.parallel.scan import Gather, Pipeline, Scan
from lasp.parallel.wires import Wire

CPU = torch.device("cpu")
SHORT, LONG = 1 << 10, 8 << 20
"""Bytes of the messages whose time is latency, and bandwidth."""
BLOCKS = 32
"""Short messages that follow one another."""


def probe(group: SequenceGroup, device: torch.device = CPU, repeat: int = 9) -> Wire:
    """The wire from each rank to the next, the same on every rank of the group, which call this together.

    device: what sends. Latency is a short message's way round all ranks, by their number; bandwidth that of a long one
    which every rank sends to the next while it receives another. By scans of states, with all that an exchange does
    (they share the cores of a machine with all its ranks): a hop is what a gather of short ones takes for each further
    rank, the share what a gather of long ones makes of the bandwidth, and the gap what a pipeline takes for each
    further block. Medians, of the slowest rank.
    """
    short, long = (torch.zeros(size, dtype=torch.uint8, device=device) for size in (SHORT, LONG))
    small, large = (_state(channels, device) for channels in (1, LONG // (8 * BLOCKS)))
    scans = ((Gather(), small), (Gather(), large), (Pipeline(1), small), (Pipeline(BLOCKS), small))
    work: list[Callable[[], None]] = [partial(_go_round, group, short), partial(_shift, group, long)]
    work += [partial(_scan, group, scan, own) for scan, own in scans]
    rounds, taken, gathered, filled, one, many = (_slowest(group, run, device, repeat) for run in work)
    latency, further = rounds / group.size, max(group.size - 1, 1)
    bandwidth = LONG / max(taken - latency, 1e-9)
    reached = large.state.nbytes * further / max(filled - gathered, 1e-9)
    gap = max(many - one, 1e-9) / (BLOCKS - 1)
    return Wire(latency, bandwidth, gathered / further, min(reached / bandwidth, 1.0), gap)


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


def _state(channels: int, device: torch.device) -> Segment:
    """The map of a rank, in fp32: BLOCKS rows of so many channels, each with its factor."""
    return Segment(torch.ones(1, 1, BLOCKS, 1, device=device), torch.ones(1, 1, BLOCKS, channels, device=device))


def _scan(group: SequenceGroup, scan: Scan, own: Segment) -> None:
    plan = make_plan((1,) * group.size, group.rank, "contiguous", None)
    Exchange(scan, plan, group, keeps=False).start([own], Affine()).wait()


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
