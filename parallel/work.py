"""How much the mixers of a model compute: floating-point operations of the mathematics, whatever carries them out.

A token of a linear recurrence writes an outer product into a state [K, V] and reads it, 4·K·V operations per state; one
of the delta rule also reads what its key holds, 6·K·V. A query of softmax attention takes 2·(K + V) per head and key
that it sees. What decays, normalises or recomputes is not counted. Each rank counts its share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from lasp.kernels.recurrence import Recurrence
from lasp.kernels.softmax.mask import Mask


@dataclass
class Work:
    """What was computed inside a `work()` block, forward; attention: what of it softmax attention was."""

    flops: float = 0.0
    attention: float = 0.0


# Like open ledgers: what happens in backward must be seen to be left out.
_open: list[Work] = []


@contextmanager
def work() -> Iterator[Work]:
    """Count what mixers compute forward while the block runs, once: not what backward computes again."""
    found = Work()
    _open.append(found)
    try:
        yield found
    finally:
        _open.remove(found)


def count_recurrence(recurrence: Recurrence, inputs: Any) -> None:
    """Count a recurrence over inputs of its kind."""
    if _counting():
        _add(recurrence.operations(inputs))


def count_attention(mask: Mask, ranks: int, q: torch.Tensor, v: torch.Tensor) -> None:
    """Count one rank's share of softmax attention whose queries q [B, T, Hq, K] are of so many ranks."""
    if _counting():
        flops = 2 * (q.shape[3] + v.shape[3]) * q.shape[0] * q.shape[2] * seen_keys(mask) / ranks
        _add(flops, flops)


def seen_keys(mask: Mask) -> int:
    """How many pairs of a query and a key that it sees there are in the whole sequence."""
    total = 0
    for length in (stop - start for start, stop in pairwise(mask.bounds)):
        if not mask.causal:
            total += length * length
        else:
            window = min(length, mask.window or length)
            total += window * (window + 1) // 2 + (length - window) * window
    return total


def _counting() -> bool:
    return bool(_open) and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() == -1


def _add(flops: float, attention: float = 0.0) -> None:
    for found in _open:
        found.flops += flops
        found.attention += attention
