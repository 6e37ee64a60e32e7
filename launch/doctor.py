"""`lasp doctor`: what the machines of a run have, whether their ranks reach each other, and how fast.

    lasp doctor --ranks 2                                   this machine, two ranks on it
    srun --nodes 2 --ntasks-per-node 2 lasp doctor --probe links.json
    torchrun --nproc-per-node 2 ... -m lasp.launch.doctor

As a rank of torchrun, srun or mpirun it looks at all their machines; rank 0 tells, a verdict per machine last.
"""

import json
import socket
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lasp.launch.cli import Parser
from lasp.launch.files import check_outputs
from lasp.launch.links import Pair, by_level, measure, pairs, reach, write_links
from lasp.launch.node import PORT, describe
from lasp.launch.place import run_command
from lasp.launch.ranks import run_ranks
from lasp.parallel import collectives
from lasp.parallel.group import SequenceGroup, join_world, shutdown
from lasp.parallel.wires import Wire

OLDEST, NEWEST = (2, 11), (2, 13)
"""The releases of torch that lasp is tested with."""

_SAME = ("python", "torch", "cuda", "nccl", "triton")
# What is amiss: seconds between clocks, bytes per second to a disk, bytes left on it, times slower than other links.
_CLOCK, _DISK, _FREE, _SLOWER = 1.0, 50e6, 5 << 30, 3.0

_PAGE = 16 << 10
"""Bytes that a machine's description takes when it travels, at most."""

Measured = list[tuple[Pair, Wire]]


def main(argv: list[str] | None = None) -> int:
    """Look. Exit code 0 where all is well, 1 where a machine has something amiss, 2 for a user error."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command(lambda: _alone(arguments), lambda: as_rank(arguments), reach)


def _options(arguments: list[str]) -> Namespace:
    """ValueError for what is no option, or a bad value."""
    parser = Parser(prog="lasp doctor", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=1, help="ranks to start on this machine, where nobody else did")
    parser.add_argument("--probe", metavar="FILE", help="write the links between ranks into a JSON file")
    parser.add_argument("--folder", default=".", help="where checkpoints will be, to look at its disk")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what sends, by default a GPU where there is one")
    options = parser.parse_args(arguments)
    if options.ranks < 1:
        raise ValueError(f"--ranks must be at least 1, got {options.ranks}")
    if not Path(options.folder).is_dir():
        raise ValueError(f"--folder {options.folder!r} is no folder")
    check_outputs({"--probe": options.probe or None})
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch finds no GPU here")
    return options


def _alone(arguments: list[str]) -> int:
    options = _options(arguments)
    if options.ranks > 1:
        return run_ranks("lasp.launch.doctor", arguments, options.ranks)
    if options.probe:
        raise ValueError("--probe measures the links between ranks: --ranks 2, or srun, mpirun, torchrun")
    return _tell([describe(Path(options.folder)) | {"clock": time.time()}], [])


def as_rank(arguments: list[str]) -> int:
    """Look as one of several ranks. Rank 0 tells, writes the link file and returns the verdict's code, the others 0."""
    options, everyone, host = _options(arguments), join_world(), socket.gethostname()
    hosts = [found["host"] for found in _gather(everyone, {"host": host})]
    place = hosts[: everyone.rank].count(host)
    own = {"host": host} if place else describe(Path(options.folder))
    collectives.barrier(everyone.control)
    seen = _gather(everyone, own | {"clock": time.time()})
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        torch.cuda.set_device(place % torch.cuda.device_count())
    measured = [(pair, _measure(pair, everyone, device)) for pair in pairs(hosts)]
    shutdown()
    if everyone.rank:
        return 0
    if options.probe:
        write_links(Path(options.probe), by_level(measured), device.type, hosts)
    return _tell(seen, measured)


def _measure(pair: Pair, everyone: SequenceGroup, device: torch.device) -> Wire:
    """The wire between two ranks, which all are told."""
    collectives.barrier(everyone.control)
    row = torch.tensor(measure(pair, everyone.rank, device) or [0.0] * len(Wire._fields), dtype=torch.float64)
    return Wire(*collectives.all_gather(row, everyone.control, "control").wait()[pair.one].tolist())


def _gather(everyone: SequenceGroup, told: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank tells, in order of rank."""
    page = json.dumps(told).encode().ljust(_PAGE)
    if len(page) > _PAGE:
        raise ValueError(f"the description of {told['host']} takes {len(page)} bytes, more than {_PAGE}")
    pages = collectives.all_gather(torch.frombuffer(bytearray(page), dtype=torch.uint8), everyone.control, "control")
    return [json.loads(bytes(row.tolist())) for row in pages.wait()]


def _tell(seen: Sequence[dict[str, Any]], measured: Measured) -> int:
    """Print what was seen, and a verdict on each machine; 1 where one has something amiss.

    seen: by each rank; the first rank of a machine has described it.
    """
    hosts = [node["host"] for node in seen]
    nodes = {host: seen[hosts.index(host)] for host in dict.fromkeys(hosts)}
    for host, node in nodes.items():
        print(f"{host}, {hosts.count(host)} rank{'s' * (hosts.count(host) > 1)}")
        for name, value in _facts(node, seen[0]).items():
            print(f"  {name:8}{value}")
    for pair, link in measured:
        where = " and ".join(dict.fromkeys((hosts[pair.one], hosts[pair.other])))
        print(f"{pair.level:10}{link}, ranks {pair.one} and {pair.other} of {where}")
    verdicts = {
        host: [*_slow(host, hosts, measured), *amiss(node, seen[0], hosts.count(host))] for host, node in nodes.items()
    }
    for host, found in verdicts.items():
        print(f"{host}: {'; '.join(found) or 'well'}")
    return int(any(verdicts.values()))


def _facts(node: dict[str, Any], first: dict[str, Any]) -> dict[str, str]:
    ports = f"{PORT} is {'free' if node['port'] else 'taken'}"
    if node["range"]:
        ports += f", ranks listen at {node['range'][0]} to {node['range'][1]}"
    return {
        **{name: node[name] for name in _SAME},
        "devices": f"{'; '.join(node['devices']) or 'no GPU'}; {node['cores']} cores, {node['memory'] / 2**30:.1f} GiB",
        "clock": f"{node['clock'] - first['clock']:+.3f} s",
        "disk": f"{node['disk'] / 1e6:.0f} MB/s, {node['free'] / 2**30:.1f} GiB free in {node['folder']}",
        "ports": ports,
    }


def amiss(node: dict[str, Any], first: dict[str, Any], ranks: int) -> list[str]:
    """What is wrong with a machine of some ranks, beside the first machine; empty where all is well."""
    found = [
        f"{name} {node[name]}, but {first[name]} on {first['host']}" for name in _SAME if node[name] != first[name]
    ]
    release = tuple(int(part) for part in node["torch"].split(".")[:2])
    if not OLDEST <= release <= NEWEST:
        oldest, newest = (".".join(map(str, tested)) for tested in (OLDEST, NEWEST))
        found.append(f"torch {node['torch']} is not one of {oldest} to {newest}")
    if 0 < len(node["devices"]) < ranks:
        found.append(f"{ranks} ranks, but {len(node['devices'])} GPUs")
    if abs(node["clock"] - first["clock"]) > _CLOCK:
        found.append(f"its clock is {node['clock'] - first['clock']:+.1f} s off that of {first['host']}")
    if node["unwritable"]:
        found.append(f"cannot write to {node['folder']}: {node['unwritable']}")
    elif node["disk"] < _DISK:
        found.append(f"{node['disk'] / 1e6:.0f} MB/s to {node['folder']}: checkpoints will take long")
    if node["free"] < _FREE:
        found.append(f"{node['free'] / 2**30:.1f} GiB left in {node['folder']}")
    return found


def _slow(host: str, hosts: Sequence[str], measured: Measured) -> list[str]:
    """The links of a machine that are several times slower than those of their level are in the middle."""
    found = []
    for pair, link in measured:
        if hosts[pair.other] != host:
            continue
        like = [other for peers, other in measured if peers.level == pair.level]
        usual = statistics.median(other.bandwidth for other in like)
        if link.bandwidth * _SLOWER < usual:
            found.append(f"{pair.level} {link.bandwidth / 1e9:.2f} GB/s, elsewhere {usual / 1e9:.2f}")
    return found


if __name__ == "__main__":
    sys.exit(main())
