"""One rank of `lasp bench scan`: the exchanges of a recurrence with a gate per channel, and nothing else, timed; and
steps of token mixers, which hide them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import lasp
from lasp.kernels.segment import Segment
from lasp.launch.bench.layers import Layer, measure
from lasp.launch.bench.timing import Contestant, interleave
from lasp.launch.probe import probe
from lasp.parallel import collectives
from lasp.parallel.cost import seconds
from lasp.parallel.exchange import Exchange, sizes_of
from lasp.parallel.layout import make_plan
from lasp.parallel.monoid import Affine
from lasp.parallel.scan import Heads, Pipeline, Scan, check_scan
from lasp.parallel.schedule import Links
from lasp.parallel.wires import Wires

KEY_DIM, VALUE_DIM = 128, 128


def main() -> None:
    """Prints what this rank measured as one line of JSON."""
    rank, told = int(sys.argv[1]), json.loads(sys.argv[2])
    size = told["ranks"]
    dist.init_process_group("gloo", init_method=told["store"], rank=rank, world_size=size, timeout=timedelta(minutes=5))
    torch.set_num_threads(1)
    wire = probe(lasp.SequenceGroup.from_group())
    wires = Wires(wire, wire)
    group = lasp.SequenceGroup.from_group(wires=wires)
    scans = [Pipeline(told["blocks"]) if name == Pipeline.name else check_scan(name) for name in told["scans"]]
    cells = [{"mib": mib, "scans": _cell(group, mib, scans, wires, told["repeat"])} for mib in told["mib"]]
    rows = [
        row
        for kind in told["layers"]
        for row in measure(Layer(kind, told["heads"], KEY_DIM), group, told["tokens"], scans, told["repeat"])
    ]
    print(json.dumps({"wire": wire, "cells": cells, "layers": rows}), flush=True)
    lasp.shutdown()


def _cell(
    group: lasp.SequenceGroup, mib: int, kinds: Sequence[Scan], wires: Wires, repeat: int
) -> list[dict[str, Any]]:
    """Every scan of a state of so many MiB. Not `heads`, which exchanges no states."""
    plan = make_plan((1,) * group.size, group.rank, "contiguous", None)
    heads = (mib << 20) // (4 * KEY_DIM * VALUE_DIM)
    own = Segment(torch.full((1, heads, KEY_DIM, 1), 0.5), torch.ones(1, heads, KEY_DIM, VALUE_DIM))
    links, sizes = Links.of(plan, group.size), sizes_of(own, Affine())
    scans = [scan.fitted(links, sizes, wires) for scan in kinds if not isinstance(scan, Heads)]
    run: dict[Scan, Contestant] = {
        scan: partial(_exchange, Exchange(scan, plan, group, keeps=False), own) for scan in scans
    }
    taken = interleave(run, repeat, together=lambda: collectives.barrier(group.process_group))
    found = []
    for scan in scans:
        schedule = scan.schedule(links)
        most = max(schedule.received(rank, sizes) for rank in range(group.size))
        found.append(
            {"scan": str(scan), "seconds": taken[scan], "predicted": seconds(schedule, sizes, wires),
             "received": most, "steps": schedule.steps}
        )  # fmt: skip
    return found


def _exchange(exchange: Exchange, own: Segment) -> None:
    exchange.start([own], Affine()).wait()


if __name__ == "__main__":
    main()
