"""Where torch.compile stops: at headers, collectives and the bounds of documents, which no graph can hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from lasp.parallel.group import SequenceGroup

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """A public function whose calls over a group of ranks, or with `cu_seqlens`, break the graph of torch.compile.

    They then run as they do without it, backward too. Bounds differ from batch to batch, and each would be compiled
    anew. All other calls are traced.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() and (_over_ranks(args, kwargs) or kwargs.get("cu_seqlens") is not None):
            outside: Callable[P, R] = torch.compiler.disable(function, reason="a call over ranks, or with documents")
            return outside(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def _over_ranks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(x, SequenceGroup) and x.size > 1 for x in (*args, *kwargs.values()))
