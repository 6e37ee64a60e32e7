"""The beginning of every public call: check the arguments, and agree with the other ranks before data moves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

from lasp.parallel.group import SequenceGroup
from lasp.parallel.layout import house_pieces


class Arguments(NamedTuple):
    """What a check found: `fields` that all ranks must share, this rank's number of `tokens`, and the whole sequence's
    length where the arguments tell it (`cu_seqlens`)."""

    fields: dict[str, Any]
    tokens: int
    total: int | None = None


def begin_call(group: SequenceGroup | None, check: Callable[[], Arguments]) -> Callable[[], tuple[int, ...]]:
    """Run `check`, start the agreement, and return what waits for it: every rank's number of tokens.

    Whatever `check` raises is raised as ValueError on every rank of the group. A group without checks compares nothing:
    an error stays on its own rank, and only the numbers of tokens are exchanged, unless the arguments tell the whole
    sequence's length and so the house's cut.
    """
    if group is None or group.size == 1:
        tokens = _found(check).tokens
        return lambda: (tokens,)
    if not group.checks:
        return _trusted_lengths(group, _found(check))
    try:
        arguments = _found(check)
        agreement = group.agree(_short(arguments.fields), tokens=arguments.tokens)
    except ValueError as error:  # any mistake of one rank must reach the others, which wait for its header
        group.agree({}, str(error)).wait()
        raise
    return lambda: _enough(tuple(agreement.wait()))


def _found(check: Callable[[], Arguments]) -> Arguments:
    """What `check` finds. A mistake it did not foresee (None for a tensor) is one of the user's all the same."""
    try:
        return check()
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


def _trusted_lengths(group: SequenceGroup, arguments: Arguments) -> Callable[[], tuple[int, ...]]:
    if arguments.total is None:
        lengths = group.agree({}, tokens=arguments.tokens)
        return lambda: tuple(lengths.wait())
    pieces = house_pieces(arguments.total, group.size, group.layout)
    house = tuple(sum(p.stop - p.start for p in pieces if p.rank == rank) for rank in range(group.size))
    if house[group.rank] != arguments.tokens:
        raise ValueError(
            f"without checks, rank {group.rank} of {group.size} should hold {house[group.rank]} of {arguments.total} "
            f"tokens in the {group.layout} layout, but holds {arguments.tokens}"
        )
    return lambda: house
