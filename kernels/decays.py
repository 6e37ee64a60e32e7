"""Log-decays and what they come to: `exp` of sums that are not positive."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def finite(log_decay: Tensor) -> Tensor:
    """Log-decays without -inf, which no sum survives. exp(-750) is 0 in fp64 too, and sums of -750 keep digits."""
    return log_decay.clamp(min=-750)


def decay_factor(log_decay: Tensor) -> Tensor:
    """`exp(log_decay)` for log_decay <= 0, in place, and exactly 0 where it would near the smallest normal number.

    Denormal numbers slow a matrix product on CPU a hundredfold, and are far below the resolution of the sums they
    would join.
    """
    lowest = math.log(torch.finfo(log_decay.dtype).tiny) + 8
    factor = log_decay.clamp_(min=lowest, max=0).exp_()
    return F.threshold(factor, math.exp(lowest + 1), 0.0, inplace=True)
