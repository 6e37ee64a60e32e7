"""Softmax attention with the sequence cut over ranks: three ways to bring queries and keys together.

    ring     keys and values pass from rank to rank while each computes (Ring Attention, arXiv:2310.01889)
    gather   every rank gathers all keys and values at once (LASP-2H, arXiv:2502.07563, section 3.4)
    ulysses  ranks exchange tokens for heads, and each attends to the whole sequence (DeepSpeed Ulysses,
             arXiv:2309.14509); where only the h neighbours of a group with `heads=h` exchange, rings do the rest (USP,
             arXiv:2405.07719)

Ring and gather differ in when a rank meets a block of keys: two ways to visit blocks, under one autograd.Function.
Ulysses is an exchange before and after a ring, often of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.kernels.once import once_differentiable
from lasp.kernels.precision import compute_dtype, exact
from lasp.kernels.softmax.blocks import BlockAttention, Keys, Queries, empty_attention, merge_sinks, sinks_gradient
from lasp.kernels.softmax.mask import Span
from lasp.kernels.softmax.operators import Operator, Scores
from lasp.parallel.call import ALONE, Turn
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.heads import HeadExchange, heads_to_tokens, tokens_to_heads
from lasp.parallel.keys import Gather, KeyExchange, Ring, span
from lasp.parallel.layout import Piece, joined_pieces
from lasp.parallel.methods import copies, members, rotation_of
from lasp.parallel.untraced import outside
from lasp.parallel.work import count_attention


@dataclass(frozen=True)
class Call:
    """Everything about one call that is not a tensor. cut: how the tokens lie on the ranks."""

    attention: BlockAttention
    cut: Cut
    turn: Turn
    method: str

    @property
    def group(self) -> SequenceGroup | None:
        """The ranks that share the sequence; None where this one holds all of it."""
        return self.turn.group


@outside  # tables of integers, messages and flash kernels: nothing for a compiler
def shared_attention(
    call: Call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, key_mask: Tensor | None
) -> Tensor:
    """Attention of this rank's queries over the whole sequence.

    q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hk, V] and key_mask [B, T] of this rank's tokens; sinks [Hq].
    Returns the output [B, T, Hq, V] in v's dtype.
    """
    count_attention(call.attention.mask, call.cut.size, q, v)
    group, together = call.group, members(call.method, call.group)
    if group is None or together == 1:
        return _attend(call, q, k, v, sinks, key_mask)
    heads = _head_exchange(call, group, together)
    k, v = (x.repeat_interleave(copies(together, k.shape[2]), 2) for x in (k, v))
    q, k, v = tokens_to_heads(heads, q, k, v)
    if key_mask is not None:
        shown = key_mask.to(torch.uint8)[..., None, None].expand(-1, -1, together, 1)
        key_mask = heads.scatter((shown,), "forward")[0][..., 0, 0].bool()
    if sinks is not None:
        sinks = sinks[heads.rank * q.shape[2] : (heads.rank + 1) * q.shape[2]]
    return heads_to_tokens(heads, _attend(call, q, k, v, sinks, key_mask))[0]


def _head_exchange(call: Call, group: SequenceGroup, together: int) -> HeadExchange:
    """The exchange among this rank and its neighbours."""
    first = group.rank - group.rank % together
    pieces = [p for p in call.cut.pieces if first <= p.rank < first + together]
    return HeadExchange(
        call.turn,
        tuple(range(first, first + together)),
        group.rank - first,
        call.cut.lengths[first : first + together],
        tuple(piece._replace(rank=piece.rank - first) for piece in pieces),
    )


def _attend(call: Call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, key_mask: Tensor | None) -> Tensor:
    """Attention by ring or gather, with queries and keys of all members of this rank's head exchange."""
    group, together = call.group, members(call.method, call.group)
    cut, ranks, rank = call.cut, call.cut.size // together, call.cut.rank // together
    pieces = cut.keep(("joined", together), lambda: joined_pieces(cut.pieces, together))
    exchange: KeyExchange
    if group is not None and ranks > 1 and call.method == "gather":
        exchange = Gather(pieces, cut.lengths, rank, group.process_group)
    else:
        rotation = rotation_of(pieces, ranks, call.attention.mask)
        # On the ring with this rank are those at its place among the members of their exchange.
        peers = range(cut.rank % together, cut.size, together)
        exchange = Ring(rotation, peers, rank, None if group is None else group.process_group)
    queries = tuple(piece for piece in pieces if piece.rank == rank)
    turn = call.turn if ranks > 1 else ALONE
    with exact(q):
        if ranks == len(queries) == 1 and sinks is None:
            every = span(queries[0])
            tile = call.attention.as_one(every, Keys(every, k, v, key_mask))
            if tile is not None:
                whole: Tensor = _Tile.apply(*tile, q, k, v)
                return whole
        part = _Part(turn, call.attention, queries, exchange)
        output: Tensor = _Attention.apply(part, q, k, v, sinks, key_mask)
    return output


class _Part(NamedTuple):
    """What one rank of a ring does for a call. pieces: of its queries."""

    turn: Turn
    attention: BlockAttention
    pieces: tuple[Piece, ...]
    exchange: KeyExchange


class _Attention(torch.autograd.Function):
    """
    inputs     q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hk, V], sinks [Hq] or None, key_mask [B, T] or None
    output     [B, T, Hq, V]
    forward    ring: one hop of [B, T_r, Hk, K + V] after another, of long shards some heads after others; gather: one
               all-gather of the same
    backward   ring: the same hops again, and the gradients of keys and values in fp32 after them and home;
               gather: one reduce-scatter of the gradients of keys and values in fp32
    """

    @staticmethod
    def forward(
        ctx: Any, part: _Part, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, key_mask: Tensor | None
    ) -> Tensor:
        local = Span(0, q.shape[1])
        queries = Queries(local, q, *empty_attention(q, v))

        def visit(heads: slice, keys: Keys) -> None:
            for piece in part.pieces:
                part.attention.attend(queries.part(span(piece), piece.offset, _sharing(heads, q, k)), keys)

        with part.turn.forward():
            kept = part.exchange.forward(Keys(local, k, v, key_mask), visit)
        if sinks is not None:
            merge_sinks(queries.output, queries.lse, sinks)
        output = queries.output.to(v.dtype)
        ctx.part = part
        ctx.save_for_backward(q, kept.k, kept.v, kept.mask, sinks, output, queries.lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        part, (q, k, v, key_mask, sinks, output, lse) = ctx.part, ctx.saved_tensors
        # Of a query that saw nothing, exp(S - lse) must be 0.
        queries = Queries(Span(0, q.shape[1]), q, output, lse.masked_fill(lse == -torch.inf, torch.inf))
        dq = torch.zeros_like(q, dtype=compute_dtype(q))

        def visit(heads: slice, keys: Keys, dk: Tensor, dv: Tensor) -> None:
            shared = _sharing(heads, q, k)
            for piece in part.pieces:
                rows = slice(piece.offset, piece.offset + piece.stop - piece.start)
                own = queries.part(span(piece), piece.offset, shared)
                part.attention.gradients(own, grad[:, rows, shared], keys, (dq[:, rows, shared], dk, dv))

        with exact(q), part.turn.backward():
            dk, dv = part.exchange.backward(Keys(Span(0, k.shape[1]), k, v, key_mask), visit)
            dsinks = None if sinks is None else sinks_gradient(sinks, output, queries.lse, grad)
        return None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None


class _Tile(torch.autograd.Function):
    """Attention that is one tile on one rank: nothing is merged, and no sums are kept.

    q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hk, V] -> [B, T, Hq, V]. No exchange in either direction.
    """

    @staticmethod
    def forward(ctx: Any, operator: Operator, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output, lse = operator.forward(q, k, v, scores)
        output = output.to(v.dtype)
        ctx.operator, ctx.scores = operator, scores
        ctx.save_for_backward(q, k, v, output, lse)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        with exact(q):
            dq, dk, dv = ctx.operator.backward(grad, q, k, v, output, lse, ctx.scores)
        return None, None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _sharing(heads: slice, q: Tensor, k: Tensor) -> slice:
    """The heads of queries q [B, T, Hq, K] that share some of the heads of keys k [B, N, Hk, K]."""
    each = q.shape[2] // k.shape[2]
    return slice(heads.start * each, heads.stop * each)
