"""The dtype in which sums are kept."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32: the dtype of states, decays, sums, merges and accumulators."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
