"""Where torch.compile stops: at headers, collectives and the bounds of documents, which no graph can hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup

P = ParamSpec("P")
R = TypeVar("R")


def outside(function: Callable[P, R]) -> Callable[P, R]:
    """A function that torch.compile never traces: it breaks the graph and runs as it does without it, backward too."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            # Only now: it imports the compiler, which takes seconds.
            eager: Callable[P, R] = torch.compiler.disable(function, reason="exchanges, or tables of integers")
            return eager(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """A public function whose calls over a group of ranks, or with `cu_seqlens`, are `outside`; others are traced.

    Bounds differ from batch to batch, and each would be compiled anew.
    """

    apart = outside(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        stops = any(map(_stops, (*args, *kwargs.values()))) or kwargs.get("cu_seqlens") is not None
        return apart(*args, **kwargs) if stops else function(*args, **kwargs)

    return call


def _stops(argument: Any) -> bool:
    if isinstance(argument, Cut):
        return argument.size > 1 or argument.packed
    return isinstance(argument, SequenceGroup) and argument.size > 1
