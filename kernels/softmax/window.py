"""Softmax attention over a sliding window, on one device, told what came before each stretch of tokens.

It also returns what the softmax is made of, which flash kernels keep to themselves: the sum of the exponentials and the
largest score. Queries stand in chunks, each against the keys that any of them sees: of a window of w tokens, c + w - 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lasp.kernels.chunks import ceil_div
from lasp.kernels.once import once_differentiable
from lasp.kernels.precision import compute_dtype, exact

CHUNK = (16, 128)  # the least and the most queries of a chunk; between these as many as the window has tokens
SCORES = 2**18  # of a head at a time


class Sight(NamedTuple):
    """Which of the tokens in its window each query sees."""

    shown: Tensor  # [B, w - 1 + T] bool: False hides a key
    reach: Tensor  # [T] of integers: how many tokens ahead of each query are of its document


class Windowed(NamedTuple):
    """Softmax attention over a window, and its parts, in the compute dtype; a query that sees nothing has output 0."""

    output: Tensor  # [B, T, Hq, V]
    lse: Tensor  # [B, T, Hq], the logarithm of the sum of the exponentiated scores; -inf where nothing is seen
    top: Tensor  # [B, T, Hq], the largest score; -inf where nothing is seen


def window_attention(q: Tensor, k: Tensor, v: Tensor, sight: Sight, window: int, scale: float) -> Windowed:
    """Attention of T tokens over themselves and the window - 1 tokens before each.

    q [B, T, Hq, K]; k [B, w - 1 + T, Hk, K] and v [B, w - 1 + T, Hk, V], the tokens ahead of the first included; Hk
    divides Hq. scale: of the scores. Differentiable in q, k and v, once.
    """
    return Windowed(*_Window.apply(_Chunked(window, scale), sight, q, k, v))


class _Window(torch.autograd.Function):
    """q [B, T, Hq, K], k [B, w - 1 + T, Hk, K], v [B, w - 1 + T, Hk, V] -> output [B, T, Hq, V], lse and top
    [B, T, Hq]. Scores are computed again in backward."""

    @staticmethod
    def forward(ctx: Any, chunked: _Chunked, sight: Sight, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        with exact(q):
            found = chunked.forward(q, k, v, sight)
        ctx.chunked = chunked
        ctx.save_for_backward(q, k, v, found.output, found.lse, *sight)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse, *sight = ctx.saved_tensors
        with exact(q):
            dq, dk, dv = ctx.chunked.backward(grads, q, k, v, (output, lse), Sight(*sight))
        return None, None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@dataclass(frozen=True)
class _Chunked:
    """The attention of some rows after others, each in chunks."""

    window: int
    scale: float

    @property
    def size(self) -> int:
        """Queries of a chunk."""
        return min(max(self.window, CHUNK[0]), CHUNK[1])

    @property
    def sees(self) -> int:
        """Keys that any query of a chunk sees."""
        return self.size + self.window - 1

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Windowed:
        parts = []
        for rows, cols in self._blocks(q.shape[1]):
            scores = self._scores(q[:, rows], k[:, cols], Sight(sight.shown[:, cols], sight.reach[rows]))
            lse = scores.logsumexp(-1, keepdim=True)
            weights = (scores - lse.masked_fill(lse == -torch.inf, torch.inf)).exp()
            output = weights.flatten(3, 4) @ self._keys(v[:, cols], scores.shape[2])
            found = (output.unflatten(3, scores.shape[3:5]), lse, scores.amax(-1, keepdim=True))
            parts.append([_in_rows(x, rows.stop - rows.start) for x in found])
        output, lse, top = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        return Windowed(output, lse.squeeze(-1), top.squeeze(-1))

    def backward(
        self,
        grads: tuple[Tensor, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        known: tuple[Tensor, Tensor],
        sight: Sight,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """grads: of output, lse and top; known: output and lse."""
        grad, grad_lse, grad_top = grads
        output, lse = known
        blind = lse == -torch.inf
        lse = lse.masked_fill(blind, torch.inf)
        # dS = P·(dO·V^T - rowsum(dO·O) + dlse), and the largest score has a gradient of its own.
        slope, grad_top = grad_lse - (grad * output).sum(-1), grad_top.masked_fill(blind, 0)
        dq, dk, dv = [], *(torch.zeros_like(x, dtype=compute_dtype(x)) for x in (k, v))
        for rows, cols in self._blocks(q.shape[1]):
            scores = self._scores(q[:, rows], k[:, cols], Sight(sight.shown[:, cols], sight.reach[rows]))
            chunks, heads = scores.shape[2], k.shape[2]
            queries, douts = (self._queries(x[:, rows], heads, chunks) for x in (q, grad))
            sums, slopes, tops = (
                self._queries(x[:, rows].unsqueeze(-1), heads, chunks).unflatten(3, scores.shape[3:5])
                for x in (lse, slope, grad_top)
            )
            keys, values = (self._keys(x[:, cols], chunks) for x in (k, v))
            weights = (scores - sums).exp()
            dscores = weights * ((douts @ values.mT).unflatten(3, scores.shape[3:5]) + slopes)
            dscores.scatter_add_(-1, scores.argmax(-1, keepdim=True), tops)
            weights, dscores = weights.flatten(3, 4), dscores.flatten(3, 4) * self.scale
            dq.append(_in_rows((dscores @ keys).unflatten(3, scores.shape[3:5]), rows.stop - rows.start))
            dk[:, cols] += self._overlapped(dscores.mT @ queries, cols.stop - cols.start)
            dv[:, cols] += self._overlapped(weights.mT @ douts, cols.stop - cols.start)
        return torch.cat(dq, 1), dk, dv

    def _blocks(self, tokens: int) -> Iterator[tuple[slice, slice]]:
        """Rows of queries, and the keys that they see; one block at least."""
        most = max(SCORES // self.sees // self.size, 1) * self.size
        for start in range(0, max(tokens, 1), most):
            stop = min(start + most, tokens)
            yield slice(start, stop), slice(start, stop + self.window - 1)

    def _scores(self, q: Tensor, k: Tensor, sight: Sight) -> Tensor:
        """[B, Hk, chunks, Hq / Hk, c, c + w - 1], -inf where a query does not see a key."""
        chunks, heads = max(ceil_div(q.shape[1], self.size), 1), k.shape[2]
        products = self._queries(q, heads, chunks) @ self._keys(k, chunks).mT
        scores = products.unflatten(3, (-1, self.size)).mul_(self.scale)
        row = torch.arange(self.size, device=q.device)
        ahead = row.unsqueeze(1) + self.window - 1 - torch.arange(self.sees, device=q.device)  # of the query
        reach = pad(sight.reach, (0, chunks * self.size - q.shape[1])).view(chunks, self.size, 1)
        shown = pad(sight.shown, (0, chunks * self.size - q.shape[1])).unfold(1, self.sees, self.size)
        seen = (ahead >= 0) & (ahead < self.window) & (ahead <= reach) & shown.unsqueeze(2)  # [B, chunks, c, c + w - 1]
        return scores.masked_fill_(~seen[:, None, :, None], -torch.inf)

    def _queries(self, x: Tensor, heads: int, chunks: int) -> Tensor:
        """[B, T, Hq, D] as [B, heads, chunks, Hq / heads·c, D] in the compute dtype: heads that share keys together."""
        x = pad(x.to(compute_dtype(x)), (0, 0, 0, 0, 0, chunks * self.size - x.shape[1]))
        return x.unflatten(1, (chunks, self.size)).unflatten(3, (heads, -1)).permute(0, 3, 1, 4, 2, 5).flatten(3, 4)

    def _keys(self, x: Tensor, chunks: int) -> Tensor:
        """[B, w - 1 + T, Hk, D] as [B, Hk, chunks, c + w - 1, D] in the compute dtype."""
        x = pad(x.to(compute_dtype(x)), (0, 0, 0, 0, 0, chunks * self.size + self.window - 1 - x.shape[1]))
        return x.unfold(1, self.sees, self.size).permute(0, 2, 1, 4, 3)

    def _overlapped(self, x: Tensor, tokens: int) -> Tensor:
        """[B, Hk, chunks, c + w - 1, D] added up where the chunks' keys are the same, [B, tokens, Hk, D]."""
        chunks, parts = x.shape[2], x.split(self.size, 3)
        total = x.new_zeros(*x.shape[:2], chunks + len(parts) - 1, self.size, x.shape[4])
        for i, part in enumerate(parts):
            total[:, :, i : i + chunks, : part.shape[3]] += part
        return total.flatten(2, 3)[:, :, :tokens].transpose(1, 2)


def _in_rows(x: Tensor, tokens: int) -> Tensor:
    """[B, Hk, chunks, G, c, D] as [B, tokens, Hk·G, D]."""
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)[:, :tokens]
