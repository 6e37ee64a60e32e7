"""One rank of `lasp bench scan`: the exchanges of a recurrence with a gate per channel, and nothing else, timed."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import lasp
from lasp.kernels.segment import Segment
from lasp.launch.bench.timing import Contestant, interleave
from lasp.launch.probe import probe
from lasp.parallel import collectives
from lasp.parallel.cost import seconds
from lasp.parallel.exchange import Exchange, sizes_of
from lasp.parallel.layout import make_plan
from lasp.parallel.monoid import Affine
from lasp.parallel.scan import check_scan
from lasp.parallel.schedule import Links
from lasp.parallel.wires import Wires

KEY_DIM, VALUE_DIM = 128, 128


def main() -> None:
    """Rank 0 prints what was measured as one line of JSON."""
    rank, told = int(sys.argv[1]), json.loads(sys.argv[2])
    size = told["ranks"]
    dist.init_process_group("gloo", init_method=told["store"], rank=rank, world_size=size, timeout=timedelta(minutes=5))
    group = lasp.SequenceGroup.from_group()
    wire = probe(group)
    cells = [{"mib": mib, "scans": _cell(group, mib, told, Wires(wire, wire))} for mib in told["mib"]]
    if rank == 0:
        print(json.dumps({"wire": wire, "cells": cells}), flush=True)
    lasp.shutdown()


def _cell(group: lasp.SequenceGroup, mib: int, told: dict[str, Any], wires: Wires) -> list[dict[str, Any]]:
    """Every scan of a state of so many MiB."""
    plan = make_plan((1,) * group.size, group.rank, "contiguous", None)
    heads = (mib << 20) // (4 * KEY_DIM * VALUE_DIM)
    own = Segment(torch.full((1, heads, KEY_DIM, 1), 0.5), torch.ones(1, heads, KEY_DIM, VALUE_DIM))
    links, sizes = Links.of(plan, group.size), sizes_of(own, Affine())
    scans = {name: check_scan(name).fitted(links, sizes, wires) for name in told["scans"]}
    run: dict[str, Contestant] = {
        name: partial(_exchange, Exchange(scan, plan, group, keeps=False), own) for name, scan in scans.items()
    }
    taken = interleave(run, told["repeat"], together=lambda: collectives.barrier(group.process_group))
    found = []
    for name, scan in scans.items():
        schedule = scan.schedule(links)
        most = max(schedule.received(rank, sizes) for rank in range(group.size))
        found.append(
            {"scan": str(scan), "seconds": taken[name], "predicted": seconds(schedule, sizes, wires),
             "received": most, "steps": schedule.steps}
        )  # fmt: skip
    return found


def _exchange(exchange: Exchange, own: Segment) -> None:
    exchange.start([own], Affine()).wait()


if __name__ == "__main__":
    main()
