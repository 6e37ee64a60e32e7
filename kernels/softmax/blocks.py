"""Attention of a block of queries over a block of keys, merged with what the queries have seen in other blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.kernels.backend import softmax_operator
from lasp.kernels.named import named
from lasp.kernels.precision import compute_dtype
from lasp.kernels.softmax.mask import Mask, Span, Tile, tiles
from lasp.kernels.softmax.operators import Operator, Scores


class Queries(NamedTuple):
    """Queries of consecutive tokens, and their attention over the keys met so far or, in backward, over all."""

    span: Span
    q: Tensor  # [B, T, Hq, K]
    output: Tensor  # [B, T, Hq, V], forward in the compute dtype
    lse: Tensor  # [B, T, Hq] in the compute dtype

    def part(self, span: Span, offset: int, heads: slice = slice(None)) -> Queries:
        """The queries of some of the tokens, which begin at `offset`, and of some heads: views."""
        part = (slice(None), slice(offset, offset + span.length), heads)
        return Queries(span, self.q[part], self.output[part], self.lse[part])


class Keys(NamedTuple):
    """Keys and values of consecutive tokens."""

    span: Span
    k: Tensor  # [B, N, Hk, K]
    v: Tensor  # [B, N, Hk, V]
    mask: Tensor | None = None  # [B, N] bool: False hides a key

    def heads(self, part: slice) -> Keys:
        """Those of some of the heads: views."""
        return Keys(self.span, self.k[:, :, part], self.v[:, :, part], self.mask)


@dataclass(frozen=True)
class BlockAttention:
    """Softmax attention set up for one call."""

    mask: Mask
    scale: float
    softcap: float | None = None

    def attend(self, queries: Queries, keys: Keys) -> None:
        """Merge the attention over a block of keys into the queries' output and lse."""
        with named("softmax block"):
            for rows, cols, operator, scores in self._tiles(queries.span, keys):
                output, lse = operator.forward(queries.q[:, rows], keys.k[:, cols], keys.v[:, cols], scores)
                merge(queries.output[:, rows], queries.lse[:, rows], output, lse)

    def gradients(self, queries: Queries, grad: Tensor, keys: Keys, totals: tuple[Tensor, Tensor, Tensor]) -> None:
        """Add the gradients of a block to `totals`: dq of the queries, dk and dv of the keys, in the compute dtype.

        queries carry the final output and, where a query saw nothing, an lse of +inf; grad [B, T, Hq, V].
        """
        dq, dk, dv = totals
        with named("softmax block gradients"):
            for rows, cols, operator, scores in self._tiles(queries.span, keys):
                parts = operator.backward(
                    grad[:, rows], queries.q[:, rows], keys.k[:, cols], keys.v[:, cols],
                    queries.output[:, rows], queries.lse[:, rows], scores,
                )  # fmt: skip
                for total, part in zip((dq[:, rows], dk[:, cols], dv[:, cols]), parts, strict=True):
                    total += part

    def as_one(self, rows: Span, keys: Keys) -> tuple[Operator, Scores] | None:
        """How a block is computed where it is one tile of a kind that kernels know; None elsewhere."""
        found = tiles(self.mask, rows, keys.span, keys.mask is not None)
        if [tile[:2] for tile in found] != [(rows, keys.span)] or found[0].kind == "masked" or keys.mask is not None:
            return None
        ((_, _, operator, scores),) = self._tiles(rows, keys)
        return operator, scores

    def _tiles(self, rows: Span, keys: Keys) -> Iterator[tuple[slice, slice, Operator, Scores]]:
        """The tiles of a block: which rows, which keys, and how they are computed."""
        for tile in tiles(self.mask, rows, keys.span, keys.mask is not None):
            cols = _within(tile.keys, keys.span)
            bias = self._bias(tile, keys.k, None if keys.mask is None else keys.mask[:, cols])
            operator = softmax_operator(keys.k, keys.v, bias is not None, self.softcap)
            yield _within(tile.rows, rows), cols, operator, Scores(self.scale, tile.kind == "causal", bias)

    def _bias(self, tile: Tile, like: Tensor, key_mask: Tensor | None) -> Tensor | None:
        """0 where a query sees a key, -inf elsewhere [B or 1, 1, R or 1, N]; None where all see all."""
        hidden = None if key_mask is None else ~key_mask[:, None, None]
        if tile.kind == "masked":
            seen = torch.tensor([self.mask.visible(i) for i in range(*tile.rows)], device=like.device)
            position = torch.arange(*tile.keys, device=like.device)
            outside = (position < seen[:, :1]) | (position >= seen[:, 1:])
            hidden = outside[None, None] if hidden is None else hidden | outside
        if hidden is None:
            return None
        return torch.zeros(hidden.shape, dtype=compute_dtype(like), device=like.device).masked_fill_(hidden, -torch.inf)


def _within(part: Span, whole: Span) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)


def empty_attention(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, T, Hq, V] and lse [B, T, Hq] of queries that have seen nothing yet."""
    dtype = compute_dtype(q)
    output = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
    return output, torch.full(q.shape[:3], -torch.inf, dtype=dtype, device=q.device)


def merge(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merge another block's output and lse into these, in place and in their dtype.

    Attention over two blocks is the mean of the two weighted by their sums of exponentials. Rows that saw nothing have
    lse -inf; of two such rows nothing is made, not NaN.
    """
    share = torch.sigmoid(other_lse - lse).nan_to_num_(nan=0.0)
    output.lerp_(other.to(output.dtype), share.unsqueeze(-1).to(output.dtype))
    torch.logaddexp(lse, other_lse.to(lse.dtype), out=lse)


def merge_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Let every query also see a key of value 0 whose score is its head's sink [Hq], in place.

    (Attention sinks as a learned logit per head: gpt-oss, arXiv:2508.10925, 2.1.)
    """
    sinks = sinks.to(lse.dtype)
    share = torch.sigmoid(lse - sinks).nan_to_num_(nan=0.0)  # of a row that saw nothing, with a sink of -inf
    output *= share.unsqueeze(-1)
    torch.logaddexp(lse, sinks.expand_as(lse), out=lse)


def sinks_gradient(sinks: Tensor, output: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the sinks [Hq] from the final output and lse: `-sum P_sink·rowsum(dO·O)` over the tokens.

    lse is +inf for a query that saw neither a key nor a sink.
    """
    weight = (sinks.to(lse.dtype) - lse).exp()
    return -(weight * (grad.to(lse.dtype) * output.to(lse.dtype)).sum(-1)).sum((0, 1)).to(sinks.dtype)
