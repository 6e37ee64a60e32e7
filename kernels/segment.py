"""Segment: what a stretch of tokens does to the memory state.

Every recurrence of lasp acts on the state `S` [K, V] of a head as an affine map, `S -> A·S + U`. Maps compose
associatively, which is all a scan over chunks or over ranks needs to know (ZeCO, arXiv:2507.01004, states the diagonal
case; the dense case is the WY form of DeltaNet, arXiv:2406.06484).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """The affine map `S -> A·S + U` of a stretch of tokens, real or complex.

    transfer (A): [..., 1, 1] one factor per head, [..., K, 1] one per channel, or [..., K, K] dense.
    state (U):    [..., K, V], the state the stretch leaves behind when it starts from an empty memory.
    """

    transfer: Tensor
    state: Tensor

    def __call__(self, incoming: Tensor) -> Tensor:
        """The state after the stretch, given the one before it."""
        return apply(self.transfer, incoming) + self.state

    def then(self, later: Segment) -> Segment:
        """This stretch followed by `later`, as one stretch."""
        return Segment(compose(later.transfer, self.transfer), later(self.state))

    @property
    def dim(self) -> int:
        """Of a state, the one along which it may be cut into parts that do not meet: rows where the transfer is
        diagonal, columns where it is dense (ZeCO, arXiv:2507.01004)."""
        return -2 if self.transfer.shape[-1] == 1 else -1

    def block(self, index: int, blocks: int) -> Segment:
        """What the map does to one of so many blocks of a state, cut along `dim`."""
        state = self.state.tensor_split(blocks, self.dim)[index]
        if self.dim == -1 or self.transfer.shape[-2] == 1:
            return Segment(self.transfer, state)
        return Segment(self.transfer.tensor_split(blocks, -2)[index], state)

    def adjoint(self, grad: Tensor) -> Segment:
        """The map of gradients, `dS_end -> A^T·dS_end + grad`; it runs backwards in time."""
        return Segment(transpose(self.transfer), grad)

    @staticmethod
    def identity(state: Tensor) -> Segment:
        """The map of no tokens at all, for states shaped like `state`."""
        return Segment(state.new_ones((1,) * state.dim()), torch.zeros_like(state))


def apply(transfer: Tensor, state: Tensor) -> Tensor:
    """`A·S`; a transfer whose last dim is 1 is diagonal."""
    return transfer * state if transfer.shape[-1] == 1 else transfer @ state


def compose(later: Tensor, first: Tensor) -> Tensor:
    """`A2·A1`, where either may be diagonal."""
    if first.shape[-1] == 1 and later.shape[-1] > 1:
        return later * first.mT
    return apply(later, first)


def transpose(transfer: Tensor) -> Tensor:
    """`A^T`, conjugate where it is complex; a real diagonal transfer is its own transpose."""
    transposed = transfer if transfer.shape[-1] == 1 else transfer.mT
    return transposed.conj_physical() if transposed.is_complex() else transposed
