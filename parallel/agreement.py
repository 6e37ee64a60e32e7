"""Agreement: what every rank says about its call before any data moves.

Under gloo, ranks that call a collective with different shapes or dtypes get garbage in 6 of 14 cases and an abort in
others. So each call begins with one exchange of fixed-size headers; whoever disagrees, or has found an error in its own
arguments, makes every rank raise the same ValueError.

Headers are messages with a tag of their own: whatever else the ranks do, a header meets a header. It tells which call
it belongs to, so ranks that are not at the same call see it as soon as they exchange anything.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lasp.parallel import collectives

HEADER_BYTES = 1024
MAGIC = b"lasp header 1\n"  # begins every header; another number, another format
_ERROR_BYTES = 400
NUMBER = "the group (by a random number)"
_ORDER = "the order of calls with a cut and of their backward passes (its checksum)"


class Refused(ValueError):
    """What every rank raises, from headers that all of them have."""


class Disagreement(Refused):
    """What every rank raises where the ranks' values of one field differ."""

    def __init__(self, field: str, values: list[Any]) -> None:
        told = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
        super().__init__(f"ranks disagree on {field}: {told}")
        self.field = field


class Channel:
    """The way that headers take between some ranks of a process group, and the count of calls, alike on all of them.

    process_group: can carry CPU tensors. ranks: those of it that take part, by default all. identity: what all headers
    of the channel say, which tells it from others between the same ranks. followed: a checksum of the turns that were
    taken without a header, in their order; others: channels whose turns this one's headers tell too.
    broken: what was left in the middle, so that no call is possible any more; None as long as all is well.
    """

    def __init__(self, process_group: dist.ProcessGroup, ranks: list[int] | None = None) -> None:
        self.process_group = process_group
        self.ranks = list(range(dist.get_world_size(process_group))) if ranks is None else ranks
        self.identity: dict[str, Any] = {}
        self.count = 0
        self.followed = 0
        self._follower: int | None = None  # the thread that took the last of these turns
        self.others: tuple[Channel, ...] = ()
        self.broken: str | None = None
        self.open: Agreement | None = None
        self._told: list[Agreement] = []  # not waited for yet; they own their messages

    def agree(self, call: Call, fields: dict[str, Any], error: str | None = None, tokens: int = 0) -> Agreement:
        """Start a header exchange. ValueError on this rank where an earlier call was left in the middle."""
        self._settle()
        if self.open is not None and self.broken is None:
            self.broken = str(self.open.call)
        try:
            self.check_whole()
        except ValueError as left:
            self._told.append(Agreement(self, call, {}, str(left)))  # to those that wait for a header
            raise
        return Agreement(self, call, fields, error, tokens)

    def follow(self, turn: str) -> int:
        """Take a turn without a header, as behind an agreed cut; the next header tells which ones were taken, in which
        order. Returns what tells this turn from all others."""
        self.followed = zlib.crc32(turn.encode(), self.followed)
        if torch._C._current_graph_task_id() == -1:  # a backward pass may run in a thread of autograd's
            self._follower = threading.get_ident()
        return self.followed

    def orders(self) -> dict[str, int]:
        """What a header of this thread tells of its turns without one, by group. A thread that takes none, which makes
        the next batches, say, tells nothing: where among them it comes is chance."""
        return {c._name: c.followed for c in self._followed if c._follower in (None, threading.get_ident())}

    def meet(self, orders: list[dict[str, int]]) -> None:
        """Go on from where the ranks are together again, if they told different orders."""
        for channel in self._followed:
            told = {order[channel._name] for order in orders if channel._name in order}
            if len(told) > 1:
                channel.followed = max(told)

    @property
    def _followed(self) -> tuple[Channel, ...]:
        """Those whose turns its headers tell."""
        return (self, *self.others)

    @property
    def _name(self) -> str:
        return str(self.identity.get(NUMBER))

    def check_whole(self) -> None:
        """Raises ValueError where an earlier call was left in the middle."""
        if self.broken is not None:
            raise ValueError(
                f"{self.broken} was left in the middle, and other ranks may still wait in it: end this run"
            )

    def next_call(self, operation: str) -> Call:
        """The call of an operation that comes next."""
        self._settle()
        return Call(operation, self.count + 1)

    def tell(self, operation: str, error: str) -> None:
        """Send an error in the place of the next call's header, and wait for nobody: who waits for it raises it."""
        if self.open is None and self.broken is None:
            self._told.append(Agreement(self, Call(operation, self.count + 1 + len(self._told)), {}, error))
            self.open = None

    def _settle(self) -> None:
        """Receive what the others had to say where this rank sent an error and went on."""
        while self._told and self.broken is None:
            self._told.pop(0).headers()


class Call(NamedTuple):
    """What a header is about: an operation, and its running number among the calls of a group."""

    operation: str
    number: int

    def __str__(self) -> str:
        return f"{self.operation}, number {self.number}" if self.number else self.operation


class Agreement:
    """A header exchange in flight: started at construction, settled by `wait()`."""

    def __init__(
        self, channel: Channel, call: Call, fields: dict[str, Any], error: str | None = None, tokens: int = 0
    ) -> None:
        """call and fields must be equal on all ranks; tokens, this rank's number of them, may differ."""
        self.call, self._channel = call, channel
        said = {"call": call, "of": channel.identity, "tokens": tokens, "error": error}
        packed = _pack(said | {"orders": channel.orders(), "fields": fields if error is None else {}})
        sent = torch.zeros(HEADER_BYTES, dtype=torch.uint8, device="cpu")
        sent[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        channel.open = self
        self._pending = collectives.swap_headers(sent, channel.ranks, channel.process_group)

    def headers(self) -> list[dict[str, Any]]:
        """What every rank said."""
        rows = self._pending.wait()
        self._channel.open = None
        headers = [_unpack(row, rank) for rank, row in enumerate(rows)]
        self._channel.meet([header["orders"] for header in headers])
        if all(header["of"] == self._channel.identity for header in headers):
            # Ranks of which one had skipped a call are together again.
            self._channel.count = max(self._channel.count, *(header["call"][1] for header in headers))
        return headers

    def wait(self) -> list[int]:
        """Every rank's number of tokens. Raises the same ValueError on every rank where they do not agree."""
        headers = self.headers()
        errors = {rank: header["error"] for rank, header in enumerate(headers) if header["error"]}
        if errors:
            raise Refused(_tell_errors(errors, len(headers)))
        _compare([{"the call": str(Call(*h["call"]))} | h["of"] | h["fields"] for h in headers])
        _compare_orders([header["orders"] for header in headers])
        return [header["tokens"] for header in headers]


def part(channels: Iterable[Channel]) -> None:
    """Say on each of these channels that this rank makes no more calls, and wait until all of its ranks say so.

    It is a call like any other: where a rank still waits for another one, or has taken turns in another order, all of
    them raise the same ValueError.
    """
    leaving = [Agreement(channel, Call("shutdown", 0), {}) for channel in channels]
    for agreement in leaving:
        agreement.wait()


def _pack(header: dict[str, Any]) -> bytes:
    """The header as JSON. What does not fit, or is no plain value, is an error of this rank, told like any other."""
    try:
        packed = MAGIC + json.dumps(header, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as problem:
        return _pack({**header, "error": f"an argument that cannot be compared: {problem}", "fields": {}})
    if len(packed) <= HEADER_BYTES:
        return packed
    error = header["error"] or f"the header of this call takes {len(packed)} bytes, at most {HEADER_BYTES} fit"
    printable = "".join(c if c.isprintable() else " " for c in error)
    shortened = printable.encode()[:_ERROR_BYTES].decode(errors="ignore")
    return _pack({**header, "error": shortened, "fields": {}})


def _unpack(row: torch.Tensor, rank: int) -> dict[str, Any]:
    packed = bytes(row.tolist())
    try:
        if not packed.startswith(MAGIC):
            raise ValueError("not of this version of lasp, or a message of something else")
        header: dict[str, Any] = json.loads(packed[len(MAGIC) :].rstrip(b"\0"))
    except ValueError as problem:
        told = f"{type(problem).__name__}: {problem}" if type(problem) is not ValueError else problem
        raise ValueError(f"what came from rank {rank} in place of a header is none ({told})") from problem
    return header


def _tell_errors(errors: dict[int, str], size: int) -> str:
    """One line per distinct error, with the ranks that made it when not all did."""
    lines = []
    for error in dict.fromkeys(errors.values()):
        ranks = [rank for rank, said in errors.items() if said == error]
        lines.append(error if len(ranks) == size else f"{error} (rank {', '.join(map(str, ranks))} of {size})")
    return "\n".join(lines)


def _compare(fields: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(name for own in fields for name in own):
        values = [own.get(name) for own in fields]
        if any(value != values[0] for value in values):
            raise Disagreement(name, values)


def _compare_orders(told: list[dict[str, int]]) -> None:
    """Those of each group, among the ranks that tell it."""
    for group in dict.fromkeys(group for own in told for group in own):
        if len({own[group] for own in told if group in own}) > 1:
            raise Disagreement(_ORDER, [own.get(group) for own in told])
