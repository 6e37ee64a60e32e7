"""How long the agents of several nodes wait for each other: threads, which meet at a port of this machine."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousParameters,
)

from lasp.launch import agent
from lasp.launch.outcome import Failure


def endpoint() -> str:
    """A place where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def parameters(where: str, nodes: int, **limits: int) -> RendezvousParameters:
    return RendezvousParameters("lasp", where, "job", nodes, nodes, "127.0.0.1", **limits)


def test_nodes_that_have_met_wait_for_each_other_as_long_as_they_are_told():
    where, limits = endpoint(), {"join_timeout": 30, "again_timeout": 2}
    first, second = (agent.meet(parameters(where, 2, is_host=int(place == 0), **limits)) for place in range(2))
    with ThreadPoolExecutor() as pool:
        met = [node.result() for node in [pool.submit(one.next_rendezvous) for one in (first, second)]]
    assert sorted((one.rank, one.world_size) for one in met) == [(0, 2), (1, 2)]
    began = time.monotonic()
    with pytest.raises(Failure, match=r"a node was lost and did not come back in 2 s \(--wait-again\)"):
        first.next_rendezvous()
    assert 2 <= time.monotonic() - began < 20
    for one in (first, second):
        one.shutdown()


def test_the_node_where_they_meet_is_the_last_to_leave():
    where, limits = endpoint(), {"join_timeout": 30, "again_timeout": 2}
    host, other = (agent.meet(parameters(where, 2, is_host=int(place == 0), **limits)) for place in range(2))
    with ThreadPoolExecutor() as pool:
        for node in [pool.submit(one.next_rendezvous) for one in (host, other)]:
            node.result()
        leaving = pool.submit(host.shutdown)
        time.sleep(0.5)
        assert not leaving.done()
        assert other.shutdown()
        assert leaving.result(20)


def test_a_node_that_is_lost_is_waited_for_no_longer_than_briefly(monkeypatch):
    monkeypatch.setattr(agent, "SECONDS_TO_LEAVE", 0.5)
    where, limits = endpoint(), {"join_timeout": 30, "again_timeout": 2}
    host, _ = nodes = [agent.meet(parameters(where, 2, is_host=int(place == 0), **limits)) for place in range(2)]
    with ThreadPoolExecutor() as pool:
        for node in [pool.submit(one.next_rendezvous) for one in nodes]:
            node.result()
    began = time.monotonic()
    assert host.shutdown()
    assert 0.5 <= time.monotonic() - began < 20


def test_a_node_that_nobody_joins_says_so():
    alone = agent.meet(parameters(endpoint(), 2, is_host=1, join_timeout=1, again_timeout=30))
    with pytest.raises(Failure, match=r"the other nodes did not come in 1 s \(--wait\): start all with the same"):
        alone.next_rendezvous()
    alone.shutdown()


def test_a_port_that_is_taken_is_told_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(Failure, match=f"cannot listen at --endpoint {where}: "):
            agent.meet(parameters(where, 2, is_host=1, join_timeout=600, again_timeout=1))


def test_an_endpoint_whose_node_does_not_come_is_told(monkeypatch):
    tries = Mock(side_effect=RendezvousConnectionError())
    monkeypatch.setattr(agent, "create_backend", tries)
    with pytest.raises(
        Failure, match=r"nobody listened at --endpoint first:1 for 1 s \(--wait 1\): has the node there"
    ):
        agent.meet(parameters("first:1", 2, is_host=0, join_timeout=1, again_timeout=1))
    assert tries.call_count == 2


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Failure("what was missing"), "what was missing"),
        (RendezvousClosedError(), "this job has ended on another node"),
        (RendezvousConnectionError(), "the node of --endpoint, where the nodes meet, is gone"),
    ],
)
def test_what_nodes_say_of_each_other_is_one_line(capsys, monkeypatch, error, said):
    monkeypatch.setattr(agent.run, "main", Mock(side_effect=error))
    assert agent.main() == 1
    assert capsys.readouterr().err.startswith(f"lasp: error: {said}")


def test_what_else_goes_wrong_is_told_as_torchrun_does(monkeypatch):
    monkeypatch.setattr(agent.run, "main", Mock(side_effect=RuntimeError("a rank failed")))
    with pytest.raises(RuntimeError, match="a rank failed"):
        agent.main()
