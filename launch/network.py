"""A network of its own for the ranks of one machine, as slow as one likes: Linux network namespaces and a token bucket.

Every rank gets a namespace with one interface, all of them on one bridge; what a rank sends leaves at the given rate
(`tc-htb(8)`). It needs root, and `ip` and `tc` of iproute2. There is no delay but that of the bucket.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of linux/sched.h
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_QUEUE = 0.02
"""Seconds of sending that wait at an interface before TCP is told to slow down."""


@dataclass(frozen=True)
class Network:
    """Namespaces of so many ranks. name: of all of them; rate: bits per second that each rank may send."""

    name: str
    ranks: int
    rate: float

    def command(self, rank: int) -> list[str]:
        """What goes ahead of the command of a rank."""
        return ["ip", "netns", "exec", self._space(rank)]

    def enter(self, rank: int) -> None:
        """Move this thread into the namespace of a rank, and with it those that it starts from now on."""
        with open(f"/run/netns/{self._space(rank)}") as space:
            if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), _NEW_NETWORK):
                raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {self._space(rank)}")

    @property
    def environment(self) -> dict[str, str]:
        """What lets its libraries find the interface."""
        return {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}

    def _space(self, place: int | str) -> str:
        return f"{self.name}-{place}"

    def make(self) -> None:
        """Make the bridge, the namespaces and their interfaces."""
        switch = self._space("switch")
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for rank in range(self.ranks):
            space, port = self._space(rank), f"port{rank}"
            _run("ip", "netns", "add", space)
            _run("ip", "-n", space, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", switch)
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", space, "address", "add", f"10.99.0.{rank + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", space, "link", "set", device, "up")
            self._shape(space)

    def _shape(self, space: str) -> None:
        """Let an interface send at the rate; short packets, TCP's acknowledgements, ahead of the queue of long ones.

        As the fair queues that Linux gives real interfaces do: behind what the same rank sends they would come a queue
        late, and throttle who waits for them.
        """
        rate = ("rate", f"{int(self.rate)}bit", "ceil", f"{int(self.rate)}bit")
        burst = str(64 << 10)  # one segment, which veth does not cut; more would let short messages pass untouched
        shape = (*rate, "burst", burst, "cburst", burst)
        _traffic(space, "qdisc", "root", "handle", "1:", "htb", "default", "20")
        _traffic(space, "class", "parent", "1:", "classid", "1:1", "htb", *shape)
        for name, prio in (("1:10", "0"), ("1:20", "1")):
            _traffic(space, "class", "parent", "1:1", "classid", name, "htb", *shape, "prio", prio)
        queue = max(int(self.rate / 8 * _QUEUE), 64 << 10)  # or no segment would ever enter it
        _traffic(space, "qdisc", "parent", "1:20", "bfifo", "limit", str(queue))
        short = ("match", "u16", "0x0000", "0xff80", "at", "2")  # IP packets of less than 128 bytes
        _traffic(space, "filter", "parent", "1:", "protocol", "ip", "u32", *short, "flowid", "1:10")

    def remove(self) -> None:
        """Remove what there is of it."""
        for place in ("switch", *range(self.ranks)):
            subprocess.run(["ip", "netns", "delete", self._space(place)], check=False, capture_output=True)


@contextmanager
def network(ranks: int, rate: float) -> Iterator[Network]:
    """A network that is gone afterwards, also when SIGTERM ends this process, which comes as SystemExit meanwhile.

    For the main thread. Raises ValueError where this machine cannot make one, saying why.
    """
    if reason := lacking():
        raise ValueError(f"no network can be emulated here: {reason}")
    made = Network(f"lasp{os.getpid()}", ranks, rate)
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        made.make()
        yield made
    finally:
        made.remove()
        signal.signal(signal.SIGTERM, before)


def lacking() -> str | None:
    """Why no network can be emulated on this machine; None where one can."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} of iproute2 missing"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = Network(f"lasp{os.getpid()}probe", 1, 1e9)
    try:
        probe.make()
    except ValueError as error:
        return str(error)
    finally:
        probe.remove()
    return None


def bits_per_second(text: str) -> float:
    """The rate that "200mbit" or "1gbit" stands for. Raises ValueError for anything else, a delay too."""
    found = re.fullmatch(r"(?:rate=)?(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text)
    if found is None:
        raise ValueError(f"a network is emulated by its rate alone, such as rate=1gbit or rate=200mbit, got {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def _traffic(space: str, kind: str, *rest: str) -> None:
    """Add to what shapes the traffic of a namespace's interface."""
    _run("tc", "-n", space, kind, "add", "dev", "eth0", *rest)


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"`{' '.join(command)}` said: {done.stderr.strip()}")
