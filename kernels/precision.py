"""The dtypes in which a call computes, whatever surrounds it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32: the dtype of states, decays, sums, merges and accumulators."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def product_dtype(x: Tensor) -> torch.dtype:
    """In which a linear layer multiplies x now: its own, or autocast's, which leaves fp64 alone."""
    device = x.device.type
    known = torch.amp.is_autocast_available(device) and x.dtype != torch.float64
    follows = known and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if follows else x.dtype


def exact(x: Tensor) -> AbstractContextManager[Any]:
    """Keep autocast away from what is computed on x's device: the same precision in both directions of a call."""
    known = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if known else nullcontext()
