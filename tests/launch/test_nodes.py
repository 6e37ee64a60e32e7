"""Runs over nodes that fail, docs/reliability.md: R2, R6 to R8 and a link that is cut. Nodes are network namespaces."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import pytest

from lasp.launch.network import Network, lacking, network
from tests.launch.forked import Training, alive
from tests.launch.tiny import TINY, losses, prepared, say, state, steps, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),  # more than all that is waited for below, on a machine with other work
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
networked = pytest.mark.skipif(lacking() is not None, reason=str(lacking()))
LASP = [sys.executable, "-m", "lasp.launch.cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "12"]
PATIENT = ["--timeout", "100"]  # where no watchdog is wanted
KILLED = 200
"""Steps of a run that is killed at every tenth up to the hundredth: it is far from its end at the last kill."""
STATIC = ["--nnodes", "1", "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", "29533"]


def children(process: subprocess.Popen) -> list[int]:
    """The ranks that a launcher has started, in their order."""
    try:
        return sorted(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
    except FileNotFoundError:
        return []


@contextmanager
def started(*commands: list[str], folder: Path, **environment: str) -> Iterator[list[subprocess.Popen]]:
    """Launchers, each of which says all in a file of its own; they and their ranks end with the block."""
    nodes = [start(folder, place, command, environment) for place, command in enumerate(commands)]
    try:
        yield nodes
    finally:
        for node in nodes:
            node.kill()  # its ranks are tied to it
            node.wait()


def start(folder: Path, place: int, command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    with (folder / f"said-{place}").open("ab") as file:
        told = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        return subprocess.Popen(command, stdout=file, stderr=file, env=told, start_new_session=True)


def said(folder: Path, place: int = 0) -> str:
    return (folder / f"said-{place}").read_text()


def node(net: Network, place: int, folder: Path, ranks: int = 1, *more: str, host: str = "10.99.0.1") -> list[str]:
    """`lasp launch torchrun` as one of two nodes with so many ranks each."""
    where = ["--nodes", "2", "--gpus", str(ranks), "--endpoint", f"{host}:29444", "--restarts", "12", *more]
    return [*net.command(place), *LASP, "launch", "torchrun", str(folder / "tiny.toml"), *where]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[..., Path]:
    """The folder of a run of so many steps with these arguments, on this machine."""

    @cache
    def run(steps: int, *arguments: str) -> Path:
        folder = prepared(tmp_path_factory.mktemp("undisturbed"), steps)
        assert Training(folder, [*arguments, *PATIENT]).end(600) == 0
        return folder

    return run


def compare(folder: Path, expected: Path, steps: int) -> None:
    assert state(folder, steps) == state(expected, steps)
    assert losses(folder) == losses(expected)


def kill_ranks(folder: Path, nodes: list[subprocess.Popen], kills: int) -> list[float]:
    """Kill the first and the last rank in turn, 10 steps apart; returns the seconds until the run is there again."""
    seconds, metrics = [], folder / "run" / "metrics.jsonl"

    def ranks_of_all() -> list[int]:
        return [rank for node in nodes for rank in children(node)]

    for number in range(kills):
        wait_until(lambda: ended(nodes) or (steps(folder) >= 10 * (number + 1) and ranks_of_all() != []))  # noqa: B023
        ranks = ranks_of_all()
        assert not ended(nodes), said(folder)[-3000:]
        os.kill(ranks[-(number % 2)], signal.SIGKILL)
        began = time.monotonic()
        wait_until(lambda: ended(nodes) or not any(map(alive, ranks)))  # noqa: B023
        changed = metrics.stat().st_mtime_ns
        wait_until(lambda: ended(nodes) or metrics.stat().st_mtime_ns != changed)  # noqa: B023
        seconds.append(time.monotonic() - began)
    return seconds


@pytest.mark.parametrize(
    "command",
    [
        [*LASP, "train", "{config}", "--restarts", "12"],
        [*LASP, "launch", "torchrun", "{config}", "--restarts", "12"],
        [*TORCHRUN, "--standalone", "-m", "lasp.launch.train", "{config}", "--resume", "latest"],
        [*TORCHRUN, *STATIC, "-m", "lasp.launch.train", "{config}", "--resume", "latest"],
    ],
    ids=["lasp train", "lasp launch torchrun", "torchrun", "torchrun, static"],
)
def test_ranks_start_again_after_every_kill(tmp_path, command, request, undisturbed):
    """R2, on one machine, also where torchrun is told nothing of what `lasp launch` tells it."""
    expected, folder = undisturbed(KILLED, "--sp", "2"), prepared(tmp_path / "killed", KILLED)
    words = [word.format(config=folder / "tiny.toml") for word in command]
    with started([*words, "--sp", "2", *PATIENT], folder=folder) as nodes:
        seconds = kill_ranks(folder, nodes, 10)
        assert nodes[0].wait(300) == 0, said(folder)[-3000:]
    compare(folder, expected, KILLED)
    say(f"R2, {request.node.callspec.id}: 10 of 10, there again after {min(seconds):.1f} to {max(seconds):.1f} s")


@networked
@pytest.mark.parametrize("ranks", [1, 2])
def test_two_nodes_start_again_after_every_kill(tmp_path, ranks, undisturbed):
    """R2, over a network. DDP lays out what it sums anew after its first step, and sums of more than two numbers are
    rounded otherwise then: four ranks take the other engine."""
    run = ["--sp", str(2 * ranks), "--engine", "ddp" if ranks == 1 else "fsdp2"]
    expected, folder = undisturbed(KILLED, *run), prepared(tmp_path / "killed", KILLED)
    with (
        network(2, 1e9) as net,
        started(*(node(net, place, folder, ranks, *run, *PATIENT) for place in range(2)), folder=folder) as nodes,
    ):
        seconds = kill_ranks(folder, nodes, 10)
        assert [one.wait(300) for one in nodes] == [0, 0], said(folder)[-3000:]
    compare(folder, expected, KILLED)
    say(f"R2, 2 nodes x {ranks}: 10 of 10, there again after {min(seconds):.1f} to {max(seconds):.1f} s")


def step_times(folder: Path) -> list[float]:
    """Seconds of a step, as far as they are known."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [told["seconds"] for line in lines if (told := json.loads(line)).get("seconds")]


@contextmanager
def line(net: Network) -> Iterator[str]:
    """Another way between two nodes, which holds frames for 10 ms and loses 1 %; the first one's address on it."""
    relay = [sys.executable, "-m", "tests.launch.relay", net.name, "0.01", "0.01"]
    with subprocess.Popen(relay, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield "10.98.0.1"
        finally:
            process.kill()


without_tap = pytest.mark.skipif(
    not os.path.exists("/dev/net/tun"), reason="no /dev/net/tun, which the line is made of"
)


@networked
@pytest.mark.parametrize("kind", ["50 Mbit/s", pytest.param("10 ms, 1 % lost", marks=without_tap)])
def test_a_slow_network_changes_no_bit_and_ends_nothing(tmp_path, kind, undisturbed):
    """R8: 200 steps; the second over a line that holds each frame, and loses some."""
    expected, folder = undisturbed(200, "--sp", "2"), prepared(tmp_path / "slow", 200)
    slow = kind == "50 Mbit/s"
    with network(2, 50e6 if slow else 1e9) as net, nullcontext("10.99.0.1") if slow else line(net) as host:
        commands = [node(net, place, folder, 1, "--sp", "2", *PATIENT, host=host) for place in range(2)]
        with started(*commands, folder=folder) as nodes:
            assert [one.wait(900) for one in nodes] == [0, 0], said(folder)[-3000:]
    compare(folder, expected, 200)
    assert "error" not in said(folder) + said(folder, 1)
    say(f"R8, {kind}: {max(step_times(folder)):.2f} s a step, {max(step_times(expected)):.3f} s without, bitwise")


@networked
def test_two_nodes_train_survive_a_cut_link_and_go_on(tmp_path, undisturbed):
    """An agent that has ended is started again, as a scheduler would."""
    expected, folder = undisturbed(100, "--sp", "2"), prepared(tmp_path / "cut", 100)
    with network(2, 1e9) as net:
        commands = [node(net, place, folder, 1, "--sp", "2", "--timeout", "20") for place in range(2)]
        with started(*commands, folder=folder) as nodes:
            wait_until(lambda: steps(folder) > 20)
            link = ["ip", "-n", f"{net.name}-1", "link", "set", "eth0"]
            subprocess.run([*link, "down"], check=True)
            cut, done = time.monotonic(), steps(folder)
            wait_until(lambda: all("took longer than timeout = 20 s" in said(folder, place) for place in range(2)))
            noticed = time.monotonic() - cut
            time.sleep(5)
            subprocess.run([*link, "up"], check=True)
            starts = 0
            while any(code != 0 for code in (one.poll() for one in nodes)):
                for place, one in enumerate(nodes):
                    if one.poll():
                        starts, nodes[place] = starts + 1, start(folder, place, commands[place], {})
                assert starts < 6, said(folder)[-2000:] + said(folder, 1)[-2000:]
                time.sleep(0.5)
    assert done < 100
    compare(folder, expected, 100)
    say(f"two nodes: cut at step {done}, noticed after {noticed:.1f} s by both, {starts} agents started again")


@networked
def test_a_node_that_is_lost_ends_the_run_of_the_others_in_time(tmp_path):
    """R7, where all nodes are needed: within a minute, not after the ten that they have to begin."""
    folder = prepared(tmp_path / "lost", 100_000)
    with network(2, 1e9) as net:
        commands = [node(net, place, folder, 1, "--sp", "2", *PATIENT) for place in range(2)]
        with started(*commands, folder=folder) as nodes:
            wait_until(lambda: steps(folder) > 20)
            nodes[1].kill()
            began = time.monotonic()
            assert nodes[0].wait(400) == 1
    took = time.monotonic() - began
    last = said(folder).splitlines()[-1]
    assert last == "lasp: error: a node was lost and did not come back in 45 s (--wait-again): start all nodes again"
    assert took < 60
    say(f"R7: of two nodes that are needed one is lost, the other ends after {took:.0f} s")


@networked
def test_a_node_that_is_told_to_stop_saves_together_with_the_other(tmp_path):
    """R6, of two nodes."""
    folder = prepared(tmp_path / "told", 100_000)
    with network(2, 1e9) as net:
        once = ["--sp", "2", *PATIENT, "--restarts", "0"]
        with started(*(node(net, place, folder, 1, *once) for place in range(2)), folder=folder) as nodes:
            wait_until(lambda: steps(folder) > 20)
            seen, began = steps(folder), time.monotonic()
            nodes[1].terminate()
            assert all(one.wait(60) for one in nodes), said(folder)[-3000:]
    took, done = time.monotonic() - began, steps(folder)
    assert seen <= done
    assert state(folder, done)
    assert f"saved {folder}/run/checkpoints/step-{done:06d}: --resume latest goes on" in said(folder)
    assert re.search(r"exitcode *: 75 ", said(folder))
    say(f"R6: one of two nodes is told to stop, both have saved the last step and left after {took:.1f} s")


@networked
@pytest.mark.parametrize("axes", [["--dp", "2"], ["--sp", "2"]], ids=["dp", "sp"])
def test_a_run_goes_on_with_the_nodes_that_are_left_and_again_with_all(tmp_path, axes, undisturbed):
    """R7: losses as undisturbed, to 1e-5. The node comes back later; then the run is given an end, and killed once more
    to hear of it, so that there are steps of every kind however fast they are."""
    folder, same = prepared(tmp_path / "lost", 1_000_000), ["--optimizer.schedule", "constant", "--accumulation", "8"]

    def goes_on_by(ranks: int, nodes: list[subprocess.Popen]) -> None:
        """Until the newest attempt has so many ranks, and has done some steps."""
        wait_until(lambda: attempts(folder)[-1:] == [ranks] or ended(nodes))
        done = steps(folder)
        wait_until(lambda: steps(folder) > done + 10 or ended(nodes))
        assert not ended(nodes), said(folder)[-3000:]

    with network(2, 1e9) as net:
        more = [*axes, *same, *PATIENT, "--least-nodes", "1"]
        commands = [node(net, place, folder, 1, *more) for place in range(2)]
        with started(*commands, folder=folder) as nodes:
            goes_on_by(2, nodes)
            nodes[1].kill()
            began = time.monotonic()
            goes_on_by(1, nodes[:1])
            took = time.monotonic() - began
            nodes[1] = start(folder, 1, commands[1], {})
            goes_on_by(2, nodes)
            last = steps(folder) + 100
            (folder / "tiny.toml").write_text(TINY.format(folder=folder, steps=last))
            os.kill(children(nodes[0])[0], signal.SIGKILL)
            assert [one.wait(300) for one in nodes] == [0, 0], said(folder)[-3000:]
    assert len(losses(folder)) == last
    assert losses(folder) == pytest.approx(losses(undisturbed(last, *axes, *same)), rel=1e-5)
    told = f"one of two nodes is lost, 10 steps more after {took:.0f} s, {last} in all"
    say(f"R7, {axes[0]}: {told}; ranks of the attempts: {attempts(folder)}")


def attempts(folder: Path) -> list[int]:
    """How many ranks each of them had that began to train."""
    return [int(ranks) for ranks in re.findall(r"^ranks     (\d): dp", said(folder), re.MULTILINE)]


def ended(nodes: list[subprocess.Popen]) -> bool:
    return any(one.poll() is not None for one in nodes)
