"""The wires between ranks: who reaches whom, how long a message takes, how many bytes pass in a second.

The link file, which `lasp.parallel.wires.Wires.read` understands, holds one link per level that was measured: "node",
between ranks of one machine, and "network", between machines.

    {"links": {"node": {"latency": 3.1e-05, "bandwidth": 1.2e+09, "hop": 6e-06, "share": 0.9, "gap": 3e-05},
               "network": {...}},
     "torch": "2.13.0", "date": "...", "device": "cpu", "hosts": ["gpu1", "gpu2"]}

Each is a `Wire`, as `probe.py` measures it of two ranks that both send.
"""

import json
import os
import socket
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from lasp.launch.address import own_address
from lasp.launch.place import Place
from lasp.launch.probe import probe
from lasp.parallel.group import SequenceGroup
from lasp.parallel.wires import Wire

_CONNECT = 5.0
"""Seconds in which a rank must be reached."""


@dataclass(frozen=True)
class Pair:
    """Two ranks whose link stands for those of its level, "node" or "network"."""

    level: str
    one: int
    other: int


def pairs(hosts: Sequence[str]) -> list[Pair]:
    """What is measured of ranks on these hosts: two of every node, and a rank of each node with one of the first."""
    ranks: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks.setdefault(host, []).append(rank)
    first, *others = ranks.values()
    within = [Pair("node", *here[:2]) for here in (first, *others) if len(here) > 1]
    return within + [Pair("network", first[0], there[0]) for there in others]


def measure(pair: Pair, rank: int, device: torch.device) -> Wire | None:
    """The wire between two ranks of the world; None for the others, which leave them alone until both are done."""
    if rank not in (pair.one, pair.other):
        return None
    two = dist.new_group([pair.one, pair.other], use_local_synchronization=True)
    return probe(SequenceGroup.from_group(two), device)


def by_level(measured: Sequence[tuple[Pair, Wire]]) -> dict[str, Wire]:
    """The wire of each level: the medians of what was measured."""
    found = {}
    for level in ("node", "network"):
        if wires := [wire for pair, wire in measured if pair.level == level]:
            found[level] = Wire(*map(statistics.median, zip(*wires, strict=True)))
    return found


def write_links(path: Path, links: dict[str, Wire], device: str, hosts: Sequence[str]) -> None:
    """Write the link file, whole from the moment it is there."""
    told = {
        "links": {level: wire._asdict() for level, wire in links.items()},
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "hosts": list(dict.fromkeys(hosts)),
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def reach(place: Place, store: dist.Store) -> None:
    """Connect to one rank of every machine, before anything waits for them; ValueError, on all, where one is not.

    Each listens at a port that the system hands out, at the address of its host's name, as gloo does.
    """
    speaks = place.local_rank in (0, None)
    with socket.socket() as listener:
        if speaks:
            listener.bind(("", 0))
            listener.listen(place.size)
        address = [socket.gethostname(), _own_address(place), listener.getsockname()[1] if speaks else None]
        store.set(f"address/{place.rank}", json.dumps(address))
        addresses = [json.loads(store.get(f"address/{rank}")) for rank in range(place.size)]
        failed = [rank for rank, (_, to, port) in enumerate(addresses) if speaks and port and not _connects(to, port)]
        store.set(f"missed/{place.rank}", json.dumps(failed))
        missed = {rank: json.loads(store.get(f"missed/{rank}")) for rank in range(place.size)}
        store.set(f"done/{place.rank}", "")
        with suppress(dist.DistError):  # the store's process may be first to leave
            store.wait([f"done/{rank}" for rank in range(place.size)], timedelta(seconds=60))
    if told := [f"{_name(addresses, one)} does not reach {_name(addresses, b)}" for one in missed for b in missed[one]]:
        raise ValueError("; ".join(told[:4]) + (f"; and {len(told) - 4} more" if len(told) > 4 else ""))


def _own_address(place: Place) -> str:
    """Of this host's name; the one by which it reaches rank 0 where the name has none, or is the loopback."""
    with suppress(OSError):
        named = socket.gethostbyname(socket.gethostname())
        if not named.startswith("127."):
            return named
    return own_address(socket.gethostbyname(place.address))


def _connects(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=_CONNECT):
            return True
    except OSError:
        return False


def _name(addresses: list, rank: int) -> str:
    host, address, port = addresses[rank]
    return f"rank {rank} ({host}, {address}:{port})"
