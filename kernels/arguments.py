"""Kinds of arguments. A wrong one is a ValueError of one line: its name, what it must be, and what it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor


def told(value: object) -> str:
    """A value in one short line."""
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)} of {value.dtype} on {value.device}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:40]}... of type {type(value).__name__}"


def check_tensors(optional: tuple[str, ...] = (), /, **given: Any) -> None:
    """Arguments that must be dense tensors; `optional` ones may be None."""
    for name, x in given.items():
        if x is None and name in optional:
            continue
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor{' or None' if name in optional else ''}, got {told(x)}")
        if x.is_nested or x.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got {'nested' if x.is_nested else x.layout}")


def check_flags(**given: Any) -> None:
    """Arguments that must be True or False."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {told(value)}")


def check_integer(name: str, value: Any, least: int | None = None) -> None:
    """An argument that must be a whole number, and at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        floor = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name} must be a whole number{floor}, got {told(value)}")


def check_number(name: str, value: Any) -> float | None:
    """An optional argument as a plain number, which a header can carry. It has no gradient."""
    if value is None:
        return None
    wrong = ValueError(f"{name} must be a finite number, got {told(value)}")
    trained = isinstance(value, Tensor) and value.requires_grad
    if isinstance(value, str | bytes | bool) or trained:
        raise wrong
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise wrong from None
    if not math.isfinite(number):
        raise wrong
    return number


def check_choice(name: str, value: Any, choices: Sequence[str | None]) -> None:
    """An argument that must be one of a few words."""
    if (value is None or isinstance(value, str)) and value in choices:
        return
    near = get_close_matches(value, [c for c in choices if c is not None], 1) if isinstance(value, str) else []
    meant = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {told(value)}{meant}")
