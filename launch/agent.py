"""torchrun's agent of one node of several, which waits long for the others to begin, and briefly to go on.

    python -m lasp.launch.agent --rdzv-endpoint first:29500 --rdzv-conf is_host=1,join_timeout=600,again_timeout=45 ...

Nodes of a cluster start at different times; one that is lost from a job at work seldom comes back. torchrun has one
limit for both. Its other options are this command's.
"""

import sys
import time
from contextlib import suppress
from datetime import timedelta

from torch.distributed import DistError, Store, run
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend, create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from lasp.launch.cli import print_error
from lasp.launch.outcome import Failure

_BACKEND = "lasp"
"""Name of this rendezvous, torchrun's `--rdzv-backend`."""

_LEFT = "left"
"""Of the place where they meet: how many nodes have left it."""

SECONDS_TO_LEAVE = 3
"""How long the place waits for that: nodes end together, but for one that is lost."""

_WORDS: dict[type[Exception], str] = {
    RendezvousClosedError: "this job has ended on another node, whose output says why; start all nodes again",
    RendezvousConnectionError: "the node of --endpoint, where the nodes meet, is gone: start all nodes again",
}


class Patience(RendezvousTimeout):
    """How long a node waits for the others: first seconds until they meet, then again seconds each time."""

    def __init__(self, first: int, again: int, last_call: int | None) -> None:
        super().__init__(timedelta(seconds=first), timedelta(seconds=last_call) if last_call is not None else None)
        self.again = timedelta(seconds=again)
        self.met = False
        """Whether the nodes have met."""

    @property
    def join(self) -> timedelta:
        """See base class."""
        return self.again if self.met else super().join

    @property
    def over(self) -> str:
        """What to say when it is over."""
        seconds = f"{self.join.total_seconds():.0f} s"
        if self.met:
            return f"a node was lost and did not come back in {seconds} (--wait-again): start all nodes again"
        return f"the other nodes did not come in {seconds} (--wait): start all with the same --nodes and --endpoint"


class Meeting(DynamicRendezvousHandler):
    """Where nodes meet, whose timeout is a `Patience`."""

    hosts = False
    """Whether it is this node's."""
    nodes = 1
    """How many have met last, as far as they may still be there."""

    def get_backend(self) -> str:
        """See base class."""
        return _BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """See base class. Failure where the patience is over."""
        patience = self.settings.timeout
        assert isinstance(patience, Patience)
        try:
            info = super().next_rendezvous()
        except RendezvousTimeoutError as error:
            self.nodes = 1
            raise Failure(patience.over) from error
        patience.met, self.nodes = True, info.world_size
        return info

    def shutdown(self) -> bool:
        """See base class. The node where they meet is the last to leave: the others would find it gone, and say so."""
        closed, began = super().shutdown(), time.monotonic()
        with suppress(DistError):
            left = self._store.add(_LEFT, 1) if closed else self.nodes
            while self.hosts and left < self.nodes and time.monotonic() - began < SECONDS_TO_LEAVE:
                time.sleep(0.05)
                left = self._store.add(_LEFT, 0)
        return closed


def main() -> int:
    """Be the agent; returns its exit code. What nodes say of each other is one line, the rest is torchrun's."""
    rendezvous_handler_registry.register(_BACKEND, meet)
    try:
        run.main(["--rdzv-backend", _BACKEND, *sys.argv[1:]])
    except Failure as error:
        print_error(str(error))
    except tuple(_WORDS) as error:
        print_error(_WORDS[type(error)])
    else:
        return 0
    return 1


def meet(params: RendezvousParameters) -> Meeting:
    """The place to meet at the endpoint. Failure where there is none in time."""
    first, again = params.get_as_int("join_timeout"), params.get_as_int("again_timeout")
    if first is None or again is None:
        raise ValueError("--rdzv-conf lacks join_timeout or again_timeout")
    began = time.monotonic()
    backend, store = _reach(params, first)
    left = max(1, first - int(time.monotonic() - began))
    meeting = Meeting.from_backend(
        params.run_id,
        store,
        backend,
        params.min_nodes,
        params.max_nodes,
        params.local_addr,
        Patience(left, again, params.get_as_int("last_call_timeout")),
        keep_alive_interval=params.get_as_int("keep_alive_interval") or 5,
    )
    meeting.hosts = bool(params.get_as_bool("is_host"))
    return meeting


def _reach(params: RendezvousParameters, seconds: int) -> tuple[C10dRendezvousBackend, Store]:
    """The store at the endpoint, whose node may be started later than this one: torch tries for a minute each time, so
    that a shorter limit is a minute too."""
    began = time.monotonic()
    while True:
        try:
            return create_backend(params)
        except RendezvousConnectionError as error:
            if params.get_as_bool("is_host"):
                told = str(error.__cause__).strip().partition("\n")[0]
                raise Failure(f"cannot listen at --endpoint {params.endpoint}: {told}") from error
            if (waited := time.monotonic() - began) >= seconds:
                told = f"nobody listened at --endpoint {params.endpoint} for {waited:.0f} s (--wait {seconds})"
                raise Failure(f"{told}: has the node there been started?") from error
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
