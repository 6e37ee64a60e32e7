"""Whether a tensor has values, and they may be read; and checks of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def may_look_at(x: Tensor) -> bool:
    """Whether values can be checked: an accelerator would be waited for, and fake tensors, torch.compile's and those
    that torch.func wraps have none."""
    if torch.compiler.is_compiling():
        return False
    try:
        return x.untyped_storage().device.type == "cpu"
    except NotImplementedError:
        return False


def check_values(hold: Tensor, problem: Callable[[], str]) -> None:
    """Raise ValueError(problem()) unless all of a bool tensor, of values that may be looked at, are True.

    The values come back to Python only where there is a problem.
    """
    try:
        torch._assert_async(hold.all(), "a value is wrong")
    except RuntimeError:
        raise ValueError(problem()) from None
