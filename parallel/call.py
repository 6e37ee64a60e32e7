"""The beginning of every public call: check the arguments, and agree with the other ranks before data moves.

And of every way back: the ranks must be at the backward pass of the same call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from lasp.parallel.agreement import Call
from lasp.parallel.group import SequenceGroup
from lasp.parallel.layout import house_pieces

T = TypeVar("T")


class Arguments(NamedTuple):
    """What a check found: `fields` that all ranks must share, this rank's number of `tokens`, and the whole sequence's
    length where the arguments tell it (`cu_seqlens`)."""

    fields: dict[str, Any]
    tokens: int
    total: int | None = None


class Turn:
    """One call of an operation over a group, which every rank makes in its turn.

    group: None where nothing travels. call: with the running number that all ranks count alike. Calling a turn waits
    for the agreement and returns every rank's number of tokens.
    """

    def __init__(self, group: SequenceGroup | None, call: Call, lengths: Callable[[], tuple[int, ...]]) -> None:
        self.group, self.call = group, call
        self._settle: Callable[[], tuple[int, ...]] | None = lengths
        self._lengths: tuple[int, ...] = ()

    def __call__(self) -> tuple[int, ...]:
        if self._settle is not None:
            self._lengths, self._settle = self._settle(), None  # which held every rank's header
        return self._lengths

    @property
    def process_group(self) -> dist.ProcessGroup:
        """That of the group, for calls in which something travels."""
        assert self.group is not None, "nothing travels in a call of one rank"
        return self.group.process_group

    @contextmanager
    def _whole(self, call: Call) -> Iterator[None]:
        try:
            yield
        except ValueError:  # all ranks raise it, from headers that all of them have
            raise
        except BaseException as error:
            if isinstance(error, Exception):
                self._settle_after(error)
            assert self.group is not None
            self.group.channel.broken = f"{call}, which ended by {type(error).__name__},"
            raise

    def _settle_after(self, error: Exception) -> None:
        """Where the ranks have not agreed yet and do not, that is why the others are not here."""
        try:
            self()
        except ValueError as disagreement:
            raise disagreement from error

    def forward(self) -> AbstractContextManager[None]:
        """Around what the ranks compute and exchange for the call: where it ends in the middle, the group is broken."""
        return nullcontext() if self.group is None else self._whole(self.call)

    def backward(self) -> AbstractContextManager[None]:
        """The same on the way back, which begins with an exchange of headers, unless the group has no checks.

        ValueError on every rank where one of them takes its backward passes in another order, or is in none.
        """
        if self.group is None:
            return nullcontext()
        call = self.call._replace(operation=f"backward of {self.call.operation}")
        if self.group.checks:
            self.group.channel.agree(call, {}).wait()
        return self._whole(call)


ALONE = Turn(None, Call("alone", 0), tuple)  # of a part of a call in which nothing travels


def begin_call(group: SequenceGroup | None, operation: str, check: Callable[[], Arguments]) -> Turn:
    """Run `check`, start the agreement, and return what waits for it: every rank's number of tokens.

    Whatever `check` raises is raised as ValueError on every rank of the group. A group without checks compares nothing:
    an error stays on its own rank, and only the numbers of tokens are exchanged, unless the arguments tell the whole
    sequence's length and so the house's cut.
    """
    if group is None or group.size == 1:
        tokens = _found(check).tokens
        return Turn(None, Call(operation, 0), lambda: (tokens,))
    if not group.checks:
        return Turn(group, Call(operation, 0), _trusted_lengths(group, operation, _found(check)))
    arguments = together(group, operation, check)
    agreement = group.agree(operation, _short(arguments.fields), tokens=arguments.tokens)
    return Turn(group, agreement.call, lambda: _enough(tuple(agreement.wait())))


def together(group: SequenceGroup | None, operation: str, work: Callable[[], T]) -> T:
    """What `work` returns. What it raises is told to the other ranks, which wait for this one's header, and raised on
    all of them as ValueError."""
    try:
        return _found(work)
    except ValueError as error:
        if group is not None and group.checks:
            group.agree(operation, {}, str(error)).wait()
        raise


def _found(work: Callable[[], T]) -> T:
    """What a check finds. A mistake it did not foresee (None for a tensor) is one of the user's all the same."""
    try:
        return work()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _short(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields for a header: the bounds of documents, which may be thousands, as a short hash."""
    bounds = fields.get("cu_seqlens")
    if bounds is None:
        return fields
    return fields | {"cu_seqlens": hashlib.sha256(",".join(map(str, bounds)).encode()).hexdigest()[:16]}


def _enough(lengths: tuple[int, ...]) -> tuple[int, ...]:
    if sum(lengths) < len(lengths):
        raise ValueError(f"fewer tokens than ranks: the ranks hold {list(lengths)} tokens")
    return lengths


def _trusted_lengths(group: SequenceGroup, operation: str, arguments: Arguments) -> Callable[[], tuple[int, ...]]:
    if arguments.total is None:
        lengths = group.agree(operation, {}, tokens=arguments.tokens)
        return lambda: tuple(lengths.wait())
    pieces = house_pieces(arguments.total, group.size, group.layout)
    house = tuple(sum(p.stop - p.start for p in pieces if p.rank == rank) for rank in range(group.size))
    if house[group.rank] != arguments.tokens:
        raise ValueError(
            f"without checks, rank {group.rank} of {group.size} should hold {house[group.rank]} of {arguments.total} "
            f"tokens in the {group.layout} layout, but holds {arguments.tokens}"
        )
    return lambda: house
