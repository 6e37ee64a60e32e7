"""torchrun: all ranks of this machine, or one machine's of several, restarted together when one of them fails."""

import argparse
import os
import socket
import sys

from lasp.launch.address import interface_of, is_here, own_address
from lasp.launch.job import Job, Plan
from lasp.launch.ranks import cores, loopback

_WAIT = 600
"""Seconds that a node waits for the others to begin, by default: they are started at different times."""

_AGAIN = 45
"""Seconds that it waits for them to go on: a job that has lost a node for good ends within a minute."""

_LAST_CALL = 5
"""Seconds in which further nodes may join when as many have come as are needed."""

_HEARTBEAT = 3
"""Seconds between two signs of life of a node that others can go on without; torchrun holds it for lost after three."""

_MISSED = 3 * _HEARTBEAT + _LAST_CALL + 3
"""Seconds after which those that are left go on by themselves; they look once a second at each of three things."""

_EXPOSED = (
    "torchrun's store listens on every interface of this machine, and whoever reaches it runs code as you; "
    "`lasp train` with restarts = n does the same on the loopback alone"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--restarts", type=int, default=3, help="how often all ranks are started again after a failure")
    parser.add_argument("--endpoint", help="HOST:PORT where the nodes meet, HOST being one of them; for several nodes")
    parser.add_argument("--wait", type=int, help=f"seconds that a node waits for the others to begin ({_WAIT})")
    parser.add_argument("--wait-again", type=int, help=f"seconds that it waits to meet again ({_AGAIN})")
    parser.add_argument("--least-nodes", type=int, help="go on with as few nodes, by fewer ranks, when others are lost")


def plan(job: Job, options: argparse.Namespace) -> Plan:
    """torchrun's command. ValueError for several nodes without an endpoint, or a host that nobody knows.

    The rendezvous is c10d's: with the static one, ranks do not come back after a failure. And the ranks of an attempt
    have a store of their own, or they would read in it what the last attempt's left (torch 2.11 to 2.13).
    """
    if options.restarts < 0:
        raise ValueError(f"--restarts must not be negative, got {options.restarts}")
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, cores() // job.gpus))
    if job.nodes == 1:
        several = (options.endpoint, options.wait, options.wait_again, options.least_nodes)
        if any(value is not None for value in several):
            raise ValueError("--endpoint, --wait, --wait-again, --least-nodes are of several nodes; --nodes is 1")
        agent, where = "torch.distributed.run", ["--standalone", "--local-addr", "127.0.0.1"]
        environment |= loopback()
    else:
        if options.least_nodes is not None:
            job = job.elastic(options.least_nodes)
        where, found = _meeting(job, options.endpoint, _limits(options))
        agent, environment = "lasp.launch.agent", environment | found
    if options.restarts:
        job = job.repeatable()
        if job.config.time_limit is not None:
            raise ValueError(
                f"time_limit = {job.config.time_limit:g}: torchrun takes ranks that have saved and left for failed "
                "ones, and would start them again; add --restarts 0"
            )
    nodes = f"{options.least_nodes}:{job.nodes}" if options.least_nodes is not None else str(job.nodes)
    counts = ["--nnodes", nodes, "--nproc-per-node", str(job.gpus), "--max-restarts", str(options.restarts)]
    command = [sys.executable, "-m", agent, *counts, *where, "-m", *job.module]
    return Plan(command, environment, warning=_EXPOSED if job.nodes == 1 else "")


def _limits(options: argparse.Namespace) -> str:
    """How long a node waits for others, as the agent is told. ValueError where that cannot be."""
    wait = _WAIT if options.wait is None else options.wait
    again = _AGAIN if options.wait_again is None else options.wait_again
    if min(wait, again) < 1:
        raise ValueError(f"--wait and --wait-again must be at least 1, got {wait} and {again}")
    conf = f"join_timeout={wait},again_timeout={again}"
    if options.least_nodes is None:
        return conf
    if again <= _MISSED:
        raise ValueError(f"--wait-again {again} ends a job before it can go on with fewer nodes, after {_MISSED} s")
    return f"{conf},last_call_timeout={_LAST_CALL},keep_alive_interval={_HEARTBEAT}"


def _meeting(job: Job, endpoint: str | None, conf: str) -> tuple[list[str], dict[str, str]]:
    """Options and variables of a node of several: they meet at an endpoint and speak over the network that leads there.

    torchrun would compare the endpoint with this host's name to see whether it is to listen there, and would tell the
    others that name: with an address as endpoint, or a name that does not resolve, every node waits for the others.
    """
    host, _, port = (endpoint or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(
            f"{job.nodes} nodes need --endpoint HOST:PORT, where they meet, the same on all; got {endpoint!r}"
        )
    try:
        there = socket.gethostbyname(host)
    except OSError as error:
        raise ValueError(f"--endpoint {endpoint}: {host!r} has no address here: {error.strerror}") from error
    own = own_address(there)
    conf = f"is_host={int(is_here(there))},{conf}"
    where = ["--rdzv-endpoint", f"{host}:{port}", "--rdzv-id", job.name, "--rdzv-conf", conf]
    interface = interface_of(own)
    environment = {"GLOO_SOCKET_IFNAME": interface} if interface and "GLOO_SOCKET_IFNAME" not in os.environ else {}
    return [*where, "--local-addr", own], environment
