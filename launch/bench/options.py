"""Kinds of options: what is wrong with one, in a line."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable

from lasp.launch.network import bits_per_second, lacking


def at_least(least: int, multiples: int = 1) -> Callable[[str], int]:
    """Whole numbers from `least` on, multiples of another."""

    def read(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        if int(text) % multiples:
            raise ArgumentTypeError(f"must be a multiple of {multiples}, got {text!r}")
        return int(text)

    return read


def positive(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number


def network_rate(text: str) -> str:
    """The rate of a network that can be emulated here, such as "rate=1gbit"."""
    try:
        bits_per_second(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error
    if reason := lacking():
        raise ArgumentTypeError(f"no network can be emulated here: {reason}")
    return text
