"""Log-decays and what they come to: `exp` of sums that are not positive."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


def finite(log_decay: Tensor) -> Tensor:
    """Log-decays without -inf, which no sum survives. exp(-750) is 0 in fp64 too, and sums of -750 keep digits."""
    return log_decay.clamp(min=-750)


def decay_factor(log_decay: Tensor) -> Tensor:
    """`exp(log_decay)` for log_decay <= 0, in place, and exactly 0 where it would near the smallest normal number.

    Denormal numbers slow a matrix product on CPU a hundredfold, and are far below the resolution of the sums they
    would join.
    """
    least = least_factor(log_decay.dtype)
    factor = log_decay.clamp_(min=math.log(least) - 1, max=0).exp_()
    return torch.threshold_(factor, least, 0.0)


@cache
def least_factor(dtype: torch.dtype) -> float:
    """The least decay that is not taken for 0, near the smallest normal number."""
    return torch.finfo(dtype).tiny * math.exp(9)
