"""Running log-sum-exp of a run of tokens, `z_t = log(exp(z_0) + sum_{s <= t} exp(x_s))`, forward and backward.

-inf stands for nothing: before the first token, and of a token that adds nothing. Only differences <= 0 are
exponentiated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogSum:
    """The map `z -> log(exp(z) + exp(u))` of a stretch of tokens. state (u): the log-sum-exp of the stretch alone."""

    state: Tensor

    def __call__(self, incoming: Tensor) -> Tensor:
        """z after the stretch, given the one before it."""
        return torch.logaddexp(incoming, self.state)

    def then(self, later: LogSum) -> LogSum:
        """This stretch followed by `later`, as one stretch."""
        return LogSum(later(self.state))

    @property
    def dim(self) -> int:
        """Of a state [..., channels, 1], the one along which it may be cut into blocks."""
        return -2

    def block(self, index: int, blocks: int) -> LogSum:
        """What the map does to one of so many blocks of a state."""
        return LogSum(self.state.tensor_split(blocks, self.dim)[index])


def running(x: Tensor, entering: Tensor) -> Tensor:
    """z_0 .. z_T [B, T + 1, ...] of x [B, T, ...] behind z_0 = entering [B, ...]."""
    return torch.cat([entering.unsqueeze(1), x], 1).logcumsumexp(1)


def suffix_sums(grad: Tensor, z: Tensor) -> Tensor:
    """Gradients of every z_t through itself and all later ones, `sum_{s >= t} exp(z_t - z_s)·grad_s` [B, T + 1, ...].

    The logarithms of positive and negative parts are summed apart, since the decay from z_t to z_s may underflow.
    """
    nothing = z.isneginf()

    def part(size: Tensor) -> Tensor:
        logs = (size.clamp(min=0).log() - z).masked_fill(nothing, -torch.inf)
        return (logs.flip(1).logcumsumexp(1).flip(1) + z).exp()

    return part(grad) - part(-grad)


def ratio(first: Tensor, later: Tensor) -> Tensor:
    """`exp(first - later)` for first <= later; 0 where first is nothing."""
    return (first - later).masked_fill(first.isneginf(), -torch.inf).exp()
