"""Exchanging tokens for heads, and back (DeepSpeed Ulysses, arXiv:2309.14509)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp.parallel import collectives
from lasp.parallel.call import Turn
from lasp.parallel.layout import Piece


@dataclass(frozen=True)
class HeadExchange:
    """Neighbouring ranks that hold some tokens of all heads, or all of their tokens for some heads.

    peers: the members' ranks in the group; rank: this one's place among them; lengths: their numbers of tokens;
    pieces: theirs by position, with the rank counted among the members.
    """

    turn: Turn
    peers: tuple[int, ...]
    rank: int
    lengths: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def members(self) -> int:
        return len(self.lengths)

    def scatter(self, tensors: tuple[Tensor, ...], phase: str) -> tuple[Tensor, ...]:
        """[B, T_r, h·H, D] of this rank's tokens as [B, T, H, D] of the members' tokens by position: one all-to-all."""
        own = [x.unflatten(2, (self.members, -1)) for x in tensors]
        parts = [torch.cat([x[:, :, j].flatten() for x in own]) for j in range(self.members)]
        shapes = [[(x.shape[0], length, *x.shape[3:]) for x in own] for length in self.lengths]
        arrived = self._exchange(parts, shapes, phase)
        return tuple(
            torch.cat([arrived[p.rank][i][:, p.offset : p.offset + p.stop - p.start] for p in self.pieces], 1)
            for i in range(len(tensors))
        )

    def gather(self, tensors: tuple[Tensor, ...], phase: str) -> tuple[Tensor, ...]:
        """The inverse of `scatter`."""
        sizes = [p.stop - p.start for p in self.pieces]
        split = [x.split(sizes, 1) for x in tensors]
        parts = []
        for member in range(self.members):
            places = [i for i, piece in enumerate(self.pieces) if piece.rank == member]
            parts.append(torch.cat([torch.cat([pieces[i] for i in places], 1).flatten() for pieces in split]))
        shapes = [[(x.shape[0], self.lengths[self.rank], *x.shape[2:]) for x in tensors]] * self.members
        arrived = self._exchange(parts, shapes, phase)
        return tuple(torch.cat([own[i] for own in arrived], 2) for i in range(len(tensors)))

    def _exchange(self, parts: list[Tensor], shapes: list[list[tuple[int, ...]]], phase: str) -> list[list[Tensor]]:
        """Send part j to member j; what each member sent here, in tensors of its `shapes`."""
        sizes = [[torch.Size(shape).numel() for shape in own] for own in shapes]
        totals = [sum(own) for own in sizes]
        arrived = collectives.all_to_all(parts, totals, self.peers, self.turn.process_group, phase).wait()
        return [
            [x.view(shape) for x, shape in zip(flat.split(size), own, strict=True)]
            for flat, size, own in zip(arrived, sizes, shapes, strict=True)
        ]


def tokens_to_heads(exchange: HeadExchange, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`HeadExchange.scatter`, differentiable."""
    exchanged: tuple[Tensor, ...] = _Exchange.apply(exchange, True, *tensors)
    return exchanged


def heads_to_tokens(exchange: HeadExchange, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`HeadExchange.gather`, differentiable."""
    exchanged: tuple[Tensor, ...] = _Exchange.apply(exchange, False, *tensors)
    return exchanged


class _Exchange(torch.autograd.Function):
    """
    tokens of all heads   [B, T_r, h·H, D]
    heads of all tokens   [B, T, H, D]
    forward               one all-to-all of all tensors, in either direction
    backward              one all-to-all of their gradients in the other
    """

    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, scatter: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.scatter = exchange, scatter
        with exchange.turn.forward():
            return exchange.scatter(tensors, "forward") if scatter else exchange.gather(tensors, "forward")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        exchange: HeadExchange = ctx.exchange
        with exchange.turn.backward():
            found = exchange.gather(grads, "backward") if ctx.scatter else exchange.scatter(grads, "backward")
        return None, None, *found
