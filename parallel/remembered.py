"""What a function of integers returned, kept for the next call with the same ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


def remembered(function: Callable[P, R]) -> Callable[P, R]:
    """`lru_cache`, but that torch.compile traces the function itself: of a cache it warns, and does the same."""
    kept = cast(Callable[P, R], lru_cache(maxsize=256)(function))

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs) if torch.compiler.is_compiling() else kept(*args, **kwargs)

    return call
