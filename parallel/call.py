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

    An error that `check` raises is raised as ValueError on every rank of the group. In a group without checks nothing
    is exchanged: an error stays on its own rank, and the ranks are taken to hold the house's cut of the sequence.
    """
    if group is None or group.size == 1:
        tokens = check().tokens
        return lambda: (tokens,)
    if not group.checks:
        lengths = _trusted_lengths(group, check())
        return lambda: lengths
    try:
        arguments = check()
    except Exception as error:  # any mistake of one rank must reach the others, which wait for its header
        told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        group.agree({}, told).wait()
        raise
    agreement = group.agree(arguments.fields, tokens=arguments.tokens)
    return lambda: _enough(tuple(agreement.wait()))


def fingerprint(values: tuple[int, ...]) -> str:
    """A short hash of integers, for a header."""
    return hashlib.sha256(",".join(map(str, values)).encode()).hexdigest()[:16]


def _enough(lengths: tuple[int, ...]) -> tuple[int, ...]:
    if sum(lengths) < len(lengths):
        raise ValueError(f"fewer tokens than ranks: the ranks hold {list(lengths)} tokens")
    return lengths


def _trusted_lengths(group: SequenceGroup, arguments: Arguments) -> tuple[int, ...]:
    """The house's cut; the whole length is W times the local one unless the arguments tell it."""
    total = arguments.tokens * group.size if arguments.total is None else arguments.total
    pieces = house_pieces(total, group.size, group.layout)
    lengths = tuple(sum(p.stop - p.start for p in pieces if p.rank == rank) for rank in range(group.size))
    if lengths[group.rank] != arguments.tokens:
        raise ValueError(
            f"without checks, rank {group.rank} of {group.size} should hold {lengths[group.rank]} of {total} tokens in "
            f"the {group.layout} layout, but holds {arguments.tokens}"
        )
    return lengths
