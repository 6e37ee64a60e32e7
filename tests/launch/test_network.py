"""Networks of namespaces: made as slow as asked, and gone afterwards."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import time
from multiprocessing.connection import Connection

import pytest

from lasp.launch.network import bits_per_second, lacking, network

able = pytest.mark.skipif(lacking() is not None, reason=str(lacking()))


@pytest.mark.parametrize(("text", "rate"), [("rate=1gbit", 1e9), ("200mbit", 2e8), ("rate=1.5mbit", 1.5e6)])
def test_a_rate(text: str, rate: float) -> None:
    assert bits_per_second(text) == rate


@pytest.mark.parametrize("text", ["rate=1gbit,delay=1ms", "fast", "1 gbit", ""])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match="by its rate alone"):
        bits_per_second(text)


def _say(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@able
def test_ranks_reach_each_other_and_nobody_else() -> None:
    with network(2, 2e8) as made:
        inside = made.command(1)
        assert "rate 200Mbit" in _say(*inside, "tc", "class", "show", "dev", "eth0")
        assert "10.99.0.2/24" in _say(*inside, "ip", "address", "show", "dev", "eth0")
        assert _say(*inside, "ip", "route").split()[0] == "10.99.0.0/24", "and no default route"
        reach = "import socket; s = socket.create_server(('10.99.0.1', 4000)); s.settimeout(9); s.accept()"
        server = subprocess.Popen([*made.command(0), "python3", "-c", reach])
        call = (
            "import socket, time\nfor _ in range(80):\n  try: socket.create_connection(('10.99.0.1', 4000), 9); break\n"
        )
        _say(*inside, "python3", "-c", call + "  except OSError: time.sleep(0.1)")
        assert server.wait(9) == 0
        name = made.name
    assert name not in _say("ip", "netns", "list")


def _hold(pipe: Connection) -> None:
    with network(1, 2e8) as made:
        pipe.send(made.name)
        time.sleep(30)


@able
def test_a_process_that_is_told_to_end_leaves_nothing() -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_hold, args=(there,))
    process.start()
    name = here.recv()
    assert name in _say("ip", "netns", "list")
    process.terminate()
    process.join(20)
    assert process.exitcode == 128 + signal.SIGTERM
    assert name not in _say("ip", "netns", "list")


@able
def test_what_fails_on_the_way_leaves_nothing() -> None:
    names: list[str] = []

    def fail() -> None:
        with network(1, 1e9) as made:
            names.append(made.name)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names[0] not in _say("ip", "netns", "list")
