"""Exchanging tokens for heads, and back (DeepSpeed Ulysses, arXiv:2309.14509)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lasp.kernels.once import once_differentiable
from lasp.parallel import collectives
from lasp.parallel.call import Turn
from lasp.parallel.cut import Cut
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
        parts = [[x[:, :, j] for x in own] for j in range(self.members)]
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
            parts.append([torch.cat([pieces[i] for i in places], 1) for pieces in split])
        shapes = [[(x.shape[0], self.lengths[self.rank], *x.shape[2:]) for x in tensors]] * self.members
        arrived = self._exchange(parts, shapes, phase)
        return tuple(torch.cat([own[i] for own in arrived], 2) for i in range(len(tensors)))

    def _exchange(
        self, parts: list[list[Tensor]], shapes: list[list[tuple[int, ...]]], phase: str
    ) -> list[list[Tensor]]:
        """Send the tensors of part j to member j; what each member sent here, in tensors of its `shapes`.

        They travel as bytes, each with its dtype; the longest numbers first, so that all lie where a view may begin.
        """
        dtypes = [x.dtype for x in parts[0]]
        order = sorted(range(len(dtypes)), key=lambda i: -dtypes[i].itemsize)
        packed = [torch.cat([own[i].contiguous().flatten().view(torch.uint8) for i in order]) for own in parts]
        sizes = [[torch.Size(own[i]).numel() * dtypes[i].itemsize for i in order] for own in shapes]
        totals = [sum(own) for own in sizes]
        arrived = collectives.all_to_all(packed, totals, self.peers, self.turn.process_group, phase).wait()
        found = []
        for flat, size, own in zip(arrived, sizes, shapes, strict=True):
            pieces = dict(zip(order, flat.split(size), strict=True))
            found.append([pieces[i].view(dtypes[i]).view(own[i]) for i in range(len(own))])
        return found


def head_exchange(turn: Turn, cut: Cut, steps: int = 1) -> HeadExchange:
    """The exchange among all ranks of a cut, of tensors with `steps` rows to each token."""
    pieces = tuple(
        piece._replace(start=piece.start * steps, stop=piece.stop * steps, offset=piece.offset * steps)
        for piece in cut.pieces
    )
    lengths = tuple(length * steps for length in cut.lengths)
    return HeadExchange(turn, tuple(range(cut.size)), cut.rank, lengths, pieces)


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


def leave_heads(exchange: HeadExchange, output: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
    """The output [B, T, H, V] of some heads as that of this rank's tokens, [B, T_r, h·H, V]; and their final states
    [N, H, K, V] as those of all heads, on every rank."""
    left: tuple[Tensor, Tensor] = _Leave.apply(exchange, output, final)
    return left


class _Leave(torch.autograd.Function):
    """
    inputs     output [B, T, H, V] and final states [N, H, K, V] of this rank's heads
    outputs    output [B, T_r, h·H, V] of its tokens, final states [N, h·H, K, V]
    forward    one all-to-all of the output, one all-gather of the final states
    backward   one all-to-all of the output's gradient, one reduce-scatter of that of the final states

    One function for both: a rank whose loss has no part of one of them still takes part in its exchange.
    """

    @staticmethod
    def forward(ctx: Any, exchange: HeadExchange, output: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange
        with exchange.turn.forward():
            (own,) = exchange.gather((output,), "forward")
            parts = collectives.all_gather(final, exchange.turn.process_group, "forward").wait()
        return own, torch.cat(parts.unbind(), 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_final: Tensor) -> tuple[None, Tensor, Tensor]:
        exchange: HeadExchange = ctx.exchange
        with exchange.turn.backward():
            (own,) = exchange.scatter((grad,), "backward")
            parts = torch.stack(grad_final.chunk(exchange.members, 1))
            final = collectives.reduce_scatter(parts, exchange.turn.process_group, "backward").wait()
        return None, own, final
