"""Scores: the decayed products of queries and keys inside one chunk, and their gradients.

    P_ij = scale·sum_c q_ic k_jc exp(sum_{j < m <= i} log_decay_mc)   for i >= j, else 0

Shapes: N matrices (chunks, batches and heads together), C tokens, K channels, R = G·C rows, the G queries of a state
one below the other. q [N, R, K], k [N, C, K], P [N, R, C]; masks [M, C, C], M = N, or H or 1 where matrices share
theirs; decays per channel [n, B, H, C, K] with N = n·B·H.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.kernels.decays import decay_factor
from lasp.kernels.portable.masks import squares
from lasp.kernels.portable.scratch import Scratch


class Scores(Protocol):
    """What both kinds of decay offer."""

    values: Tensor  # P

    def backward(
        self, grad: Tensor, gates: bool = True, dq: Tensor | None = None, dk: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """From dP [N, R, C], which is overwritten, to dq, dk and, if wanted, dlog_decay [N, C, 1 or K].

        dq and dk, where given, are tiles to add to, in place.
        """
        ...


class MaskedScores:
    """No decay, or one factor per head and token: `scale·(q k^T) * L`, L from `causal_mask` or `DecayMasks`."""

    def __init__(
        self, q: Tensor, k: Tensor, mask: Tensor, scale: float, scratch: Scratch, earlier: Tensor | None
    ) -> None:
        self.q, self.k, self._mask, self._scale, self._scratch, self._earlier = q, k, mask, scale, scratch, earlier
        self.values = self._masked(scratch.product(q, k.mT, scale=scale))

    def backward(
        self, grad: Tensor, gates: bool = True, dq: Tensor | None = None, dk: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        dlog = None
        if self._earlier is not None and gates:
            # The diagonal does not decay. Gate m collects the pairs i >= m > j that reach over it: summed directly,
            # never as a difference of two sums that share the pairs on one side.
            pairs = torch.mul(grad, self.values, out=self._scratch.temporary(*grad.shape))
            length = len(self._earlier)
            over = torch.mm(pairs.view(-1, length), self._earlier, out=self._scratch(pairs.numel() // length, length))
            dlog = over.view(len(grad), -1, length, length).tril_().sum((1, 2)).unsqueeze(-1)
        self._masked(grad)
        product, scale = self._scratch.product, self._scale
        return product(grad, self.k, dq, scale), product(grad.mT, self.q, dk, scale), dlog

    def _masked(self, x: Tensor) -> Tensor:
        """A tile [N, R, C] times the mask [M, C, C], in place: that of each matrix, of each head or of all."""
        mask = self._mask
        if x.shape == mask.shape:
            return x.mul_(mask)
        x.view(-1, len(mask), x.shape[1] // x.shape[2], *mask.shape[1:]).mul_(mask.unsqueeze(1))
        return x


class DyadicScores:
    """One factor per channel: the lower triangle as squares of halving size.

    In a stretch of 2b tokens the later half queries the earlier half through the border between them, so both factors,
    from the border to the query and from the key to the border, are sums of non-positive numbers, and their
    exponentials never exceed 1. The secondary chunks of GLA (arXiv:2312.06635, section 4.3) carried to the end: log2(C)
    exponentials per channel instead of 16.
    """

    def __init__(self, q: Tensor, k: Tensor, log_decay: Tensor, scale: float) -> None:  # [n, B, H, C, K]
        self.scale = scale
        self.length = k.shape[1]
        self.padding = (1 << (self.length - 1).bit_length()) - self.length
        self.q = self._pad(q.unflatten(1, (-1, self.length)) * scale)  # [N, G, C', K], C' the next power of two
        self.k = self._pad(k.unsqueeze(1))  # [N, 1, C', K]
        self.log_decay = self._pad(log_decay.flatten(0, 2).unsqueeze(1))
        values = torch.diag_embed(torch.linalg.vecdot(self.q, self.k))
        for half in self._halves():
            q_later, k_earlier, _, _ = self._carry_to_border(half)
            squares(values, half).copy_(q_later @ k_earlier.mT)
        self.values = values[..., : self.length, : self.length].flatten(1, 2)

    def backward(
        self, grad: Tensor, gates: bool = True, dq: Tensor | None = None, dk: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        grad = grad.unflatten(1, (-1, self.length))
        grad = F.pad(grad, (0, self.padding, 0, self.padding)) if self.padding else grad
        diagonal = grad.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        own_q, own_k = diagonal * self.k, (diagonal * self.q).sum(1, keepdim=True)
        dlog = torch.zeros_like(own_k)
        for half in self._halves():
            q_later, k_earlier, to_query, to_border = self._carry_to_border(half)
            between = squares(grad, half)
            dq_later = (between @ k_earlier).mul_(to_query)
            dk_earlier = (between.mT @ q_later).sum(1, keepdim=True).mul_(to_border)
            _later(own_q, half).add_(dq_later)
            _earlier(own_k, half).add_(dk_earlier)
            # A gate of the later half is crossed by the queries at or after it, one of the earlier half by the keys
            # before it.
            ones = _upper_ones(dq_later)
            _later(dlog, half).add_(ones @ dq_later.mul_(_later(self.q, half)).sum(1, keepdim=True))
            _earlier(dlog, half).add_(ones.triu(1).mT @ dk_earlier.mul_(_earlier(self.k, half)))
        cut = slice(self.length)
        own_q, own_k = own_q[:, :, cut].flatten(1, 2) * self.scale, own_k[:, 0, cut]
        return own_q if dq is None else dq.add_(own_q), own_k if dk is None else dk.add_(own_k), dlog[:, 0, cut]

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, self.padding)) if self.padding else x

    def _halves(self) -> list[int]:
        size = self.length + self.padding
        return [1 << i for i in range(size.bit_length() - 1)]

    def _carry_to_border(self, half: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries and keys carried to the border, and the factors that carry them."""
        ones = _upper_ones(self.q, half)
        to_query = decay_factor(ones.mT @ _later(self.log_decay, half))
        to_border = decay_factor(ones.triu(1) @ _earlier(self.log_decay, half))
        return _later(self.q, half) * to_query, _earlier(self.k, half) * to_border, to_query, to_border


def causal_mask(like: Tensor) -> Tensor:
    """`L` [1, C, C] of no decay: one, and zero above the diagonal."""
    length = like.shape[-2]
    return like.new_ones(1, length, length).tril_()


def _upper_ones(like: Tensor, size: int | None = None) -> Tensor:
    size = like.shape[-2] if size is None else size
    return torch.ones(size, size, dtype=like.dtype, device=like.device).triu_()


def _later(x: Tensor, half: int) -> Tensor:
    """The later halves of all stretches of 2·half tokens: [N, G, C, K] as a view [N, G, C / (2·half), half, K]."""
    return x.unflatten(-2, (-1, 2, half))[..., 1, :, :]


def _earlier(x: Tensor, half: int) -> Tensor:
    """The earlier halves, likewise."""
    return x.unflatten(-2, (-1, 2, half))[..., 0, :, :]
