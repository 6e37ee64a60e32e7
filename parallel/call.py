"""The beginning of every public call: check the arguments, and agree with the other ranks before data moves.

And of every way back: the ranks must be at the backward pass of the same call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from lasp.parallel.agreement import Call
from lasp.parallel.cut import Cut, check_cut, check_group, even_lengths

if TYPE_CHECKING:
    from lasp.parallel.group import SequenceGroup

T = TypeVar("T")


class Arguments(NamedTuple):
    """What a check found: `fields` that all ranks must share, this rank's number of `tokens`, the bounds of packed
    documents, and the whole sequence's length where the arguments tell it."""

    fields: dict[str, Any]
    tokens: int
    bounds: tuple[int, ...] | None = None
    total: int | None = None


class Turn:
    """One call of an operation over a group, which every rank makes in its turn.

    group: None where nothing travels. call: with the running number that all ranks count alike. settle: waits for the
    agreement and returns the cut of the call, as calling the turn does. agreed: the cut was agreed before the call,
    and no header is exchanged, on the way back neither: the next header tells in which order such turns were taken.
    """

    def __init__(
        self, group: SequenceGroup | None, call: Call, settle: Callable[[], Cut], agreed: bool = False
    ) -> None:
        self.group, self.call, self._agreed, self._followed = group, call, agreed, 0
        self._settle: Callable[[], Cut] | None = settle
        self._cut: Cut | None = None

    def __call__(self) -> Cut:
        if self._settle is not None:
            self._cut, self._settle = self._settle(), None  # which held every rank's header
        assert self._cut is not None, "a turn that did not settle has raised"
        return self._cut

    @property
    def process_group(self) -> dist.ProcessGroup:
        """That of the group, for calls in which something travels."""
        assert self.group is not None, "nothing travels in a call of one rank"
        return self.group.process_group

    @contextmanager
    def _whole(self, call: Call) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if isinstance(error, ValueError) and not self._agreed:
                raise  # all ranks raise it, from headers that all of them have
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
        if self.group is None:
            return nullcontext()
        if self._agreed:
            channel, cut = self.group.channel, self()
            batch = cut.keep("first turn", lambda: channel.follow(f"a cut of {cut.lengths} tokens at {cut.bounds}"))
            self._followed = channel.follow(f"{self.call.operation} of {batch}")
        return self._whole(self.call)

    def backward(self) -> AbstractContextManager[None]:
        """The same on the way back, which begins with an exchange of headers where the call did.

        ValueError on every rank where one of them takes its backward passes in another order, or is in none.
        """
        if self.group is None:
            return nullcontext()
        call = self.call._replace(operation=f"backward of {self.call.operation}")
        if self._agreed:
            self.group.channel.follow(f"{call.operation} {self._followed}")
        elif self.group.checks:
            self.group.channel.agree(call, {}).wait()
        return self._whole(call)


# Of a part of a call in which nothing travels.
ALONE = Turn(None, Call("alone", 0), lambda: Cut(None, (0,)), agreed=True)


def begin_call(
    group: SequenceGroup | None, operation: str, check: Callable[[], Arguments], cut: Cut | None = None
) -> Turn:
    """Run `check`, start the agreement, and return what waits for it: the call's cut.

    Whatever `check` raises is raised as ValueError on every rank of the group. A group without checks compares nothing:
    an error stays on its own rank, and only the numbers of tokens are exchanged, unless the arguments tell the whole
    sequence's length and so the even cut. Given a cut, nothing is exchanged: the arguments must fit it, and an error
    stays on its own rank.
    """
    if cut is not None:
        return _follow(cut, group, operation, check)
    check_group(group)
    if group is None or group.size == 1:
        arguments = _found(check)
        alone = Cut(group, (arguments.tokens,), arguments.bounds)
        return Turn(None, Call(operation, 0), lambda: alone)
    if not group.checks:
        return Turn(group, Call(operation, 0), _trusted(group, operation, _found(check)))
    arguments = together(group, operation, check)
    agreement = group.agree(operation, _short(arguments), tokens=arguments.tokens)
    return Turn(group, agreement.call, lambda: _agreed_cut(group, tuple(agreement.wait()), arguments.bounds))


def _follow(cut: Cut, group: SequenceGroup | None, operation: str, check: Callable[[], Arguments]) -> Turn:
    """The turn of a call that is given a cut."""
    if group is not None:
        raise ValueError(f"{operation} takes a cut or a group, not both: a cut has its group")
    if isinstance(cut, Cut) and cut.group is not None:
        cut.group.channel.check_whole()
    arguments = _found(check) if isinstance(cut, Cut) else Arguments({}, 0)
    check_cut(cut, arguments.tokens, operation)
    return Turn(cut.group if cut.size > 1 else None, Call(operation, 0), lambda: cut, agreed=True)


def together(group: SequenceGroup | None, operation: str, work: Callable[[], T]) -> T:
    """What `work` returns. What it raises is told to the other ranks, which wait for this one's header, and raised on
    all of them as ValueError."""
    check_group(group)
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


def _short(arguments: Arguments) -> dict[str, Any]:
    """Fields for a header: the bounds of documents, which may be thousands, as a short hash."""
    bounds = arguments.bounds
    if bounds is None:
        return arguments.fields | {"cu_seqlens": None}
    return arguments.fields | {"cu_seqlens": hashlib.sha256(",".join(map(str, bounds)).encode()).hexdigest()[:16]}


def _agreed_cut(group: SequenceGroup, lengths: tuple[int, ...], bounds: tuple[int, ...] | None) -> Cut:
    if sum(lengths) < len(lengths):
        raise ValueError(f"fewer tokens than ranks: the ranks hold {list(lengths)} tokens")
    return Cut(group, lengths, bounds)


def _trusted(group: SequenceGroup, operation: str, arguments: Arguments) -> Callable[[], Cut]:
    total = arguments.total if arguments.bounds is None else arguments.bounds[-1]
    if total is None:
        lengths = group.agree(operation, {}, tokens=arguments.tokens)
        return lambda: Cut(group, tuple(lengths.wait()))
    even = Cut(group, even_lengths(total, group.size, group.layout), arguments.bounds)
    if even.tokens != arguments.tokens:
        raise ValueError(
            f"without checks, rank {group.rank} of {group.size} should hold {even.tokens} of {total} "
            f"tokens in the {group.layout} layout, but holds {arguments.tokens}"
        )
    return lambda: even


def modes() -> dict[str, Any]:
    """What of torch's modes must be the same on all ranks of a batch."""
    autocast = {
        kind: str(torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
    }
    return {"autocast": autocast, "gradients": torch.is_grad_enabled()}
