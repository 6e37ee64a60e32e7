"""The pace of a machine that others share: a piece of work that is always the same, timed beside what is measured.

What two moments of such a machine take for one step differs by a third; in units of its pace, by a few percent.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn


class Pace:
    """A layer of a transformer there and back, in fp32: products and passes over memory, as steps have."""

    def __init__(self, tokens: int = 1024, width: int = 256) -> None:
        self._layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self._tokens = torch.randn(1, tokens, width)

    def __call__(self) -> float:
        """Seconds that it takes now."""
        started = time.perf_counter()
        self._layer(self._tokens).square().mean().backward()
        self._layer.zero_grad()
        return time.perf_counter() - started

    def beside(self, run: Callable[[], float]) -> tuple[float, float]:
        """What a run returns, and the mean of the paces before and after it."""
        before = self()
        found = run()
        return found, (before + self()) / 2
