"""A slow line between two namespaces of a network, where the kernel has no netem: frames are held, some are lost.

    python -m tests.launch.relay NAME SECONDS LOST

adds an interface `line` to each, with the addresses 10.98.0.1 and 10.98.0.2, says "ready", and carries frames between
them, each `SECONDS` late; a share `LOST` of them never arrives.
"""

import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque

from lasp.launch.network import Network

_TUNSETIFF, _TAP_WITHOUT_HEADER = 0x400454CA, 0x1002  # linux/if_tun.h


def open_line(net: Network, place: int) -> int:
    """The other end of a new interface of a namespace: what is sent there is read here."""
    net.enter(place)
    end = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", b"line", _TAP_WITHOUT_HEADER))
    for words in (("address", "add", f"10.98.0.{place + 1}/24", "dev", "line"), ("link", "set", "line", "up")):
        subprocess.run(["ip", *words], check=True)
    return end


def carry(ends: list[int], seconds: float, lost: float) -> None:
    """For ever."""
    chance, held = random.Random(0), deque[tuple[float, int, bytes]]()
    while True:
        wait = max(0.0, held[0][0] - time.monotonic()) if held else None
        for end in select.select(ends, [], [], wait)[0]:
            frame = os.read(end, 1 << 16)
            if chance.random() >= lost:
                held.append((time.monotonic() + seconds, ends[end == ends[0]], frame))
        while held and held[0][0] <= time.monotonic():
            _, end, frame = held.popleft()
            os.write(end, frame)


if __name__ == "__main__":
    ends = [open_line(Network(sys.argv[1], 2, 1e9), place) for place in range(2)]
    os.write(1, b"ready\n")
    carry(ends, float(sys.argv[2]), float(sys.argv[3]))
