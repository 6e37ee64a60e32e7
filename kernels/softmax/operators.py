"""Attention of one tile, each operator a thin adapter to what a device has; `lasp.kernels.backend` chooses.

All of them speak the same shapes: q [B, R, Hq, K], k [B, N, Hk, K], v [B, N, Hk, V], where Hk divides Hq; output
[B, R, Hq, V]; lse [B, R, Hq], the natural logarithm of the sum of the exponentiated scores. Backward takes the output
and lse of the *whole* attention, `dS = P·(dO·V^T - rowsum(dO·O))` with `P = exp(S - lse)` (FlashAttention-2,
arXiv:2307.08691, algorithm 2), so that the gradients of tiles add up. A row that saw nothing has lse +inf there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from lasp.kernels.precision import compute_dtype

Gradients = tuple[Tensor, Tensor, Tensor]


class Scores(NamedTuple):
    """How the scores of a tile come about: `scale·q·k`, below the diagonal of a square, plus a bias."""

    scale: float
    causal: bool = False
    bias: Tensor | None = None  # [B or 1, 1, R or 1, N] in the compute dtype, 0 or -inf; never with causal


class Operator(Protocol):
    """Attention of one tile and its gradients."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """Output and lse; a row that sees nothing has output 0 and lse -inf."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, scores: Scores
    ) -> Gradients:
        """Gradients of q, k, v, given the whole attention's output and lse."""
        ...


class CpuFlash:
    """PyTorch's flash attention for CPUs: any float dtype, grouped heads, bias.

    It wants one head dim, of stride 1, so the shorter of K and V is padded with zeros. Half precision is computed in
    fp32: backward is then 2 to 5 times faster on a CPU without matrix units for bf16, and partial outputs are never
    rounded.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        value_dim = v.shape[-1]
        q, k, v = _heads_first(max(q.shape[-1], value_dim), q, k, v)
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, scores.causal, attn_mask=scores.bias, scale=scores.scale
        )
        if scores.bias is not None:  # the operator gives rows that see nothing an lse of 0
            lse = lse.masked_fill((scores.bias == -torch.inf).all(-1), -torch.inf)
        return output.transpose(1, 2)[..., :value_dim], lse.transpose(1, 2)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, scores: Scores
    ) -> Gradients:
        key_dim, value_dim = k.shape[-1], v.shape[-1]
        grad, q, k, v, output = _heads_first(max(key_dim, value_dim), grad, q, k, v, output)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, output, lse.transpose(1, 2), 0.0, scores.causal, attn_mask=scores.bias, scale=scores.scale
        )
        return dq.transpose(1, 2)[..., :key_dim], dk.transpose(1, 2)[..., :key_dim], dv.transpose(1, 2)[..., :value_dim]


@dataclass(frozen=True)
class Plain:
    """Matrix products, on any device and for any dtype, with an optional softcap; some rows at a time.

    softcap: scores become `softcap·tanh(scores / softcap)` before they are masked (Gemma 2, arXiv:2408.00118, 2.2).
    """

    softcap: float | None = None
    rows: int = 512  # at a time: a quarter of a gigabyte of fp32 scores for 8 heads and 16384 keys

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        outputs, sums = [], []
        keys, values = _grouped(k, k.shape[2]), _grouped(v, v.shape[2])
        for rows in self._chunks(q):
            logits, _ = self._logits(q, keys, scores, rows)
            lse = logits.logsumexp(-1, keepdim=True)
            weights = (logits - lse.masked_fill(lse == -torch.inf, torch.inf)).exp()
            outputs.append(_ungrouped(weights @ values, rows.stop - rows.start))
            sums.append(_ungrouped(lse, rows.stop - rows.start).squeeze(-1))
        return torch.cat(outputs, 1), torch.cat(sums, 1)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, scores: Scores
    ) -> Gradients:
        heads = k.shape[2]
        keys, values = _grouped(k, heads), _grouped(v, heads)
        dk, dv, dq = torch.zeros_like(keys), torch.zeros_like(values), []
        delta = (grad.to(lse.dtype) * output.to(lse.dtype)).sum(-1, keepdim=True)
        for rows in self._chunks(q):
            logits, slope = self._logits(q, keys, scores, rows)
            weights = (logits - _grouped(lse[:, rows].unsqueeze(-1), heads)).exp()
            grads = _grouped(grad[:, rows], heads)
            dv += weights.mT @ grads
            dscores = weights * (grads @ values.mT - _grouped(delta[:, rows], heads))
            if slope is not None:
                dscores *= slope
            dq.append(_ungrouped(dscores @ keys, rows.stop - rows.start) * scores.scale)
            dk += dscores.mT @ _grouped(q[:, rows], heads) * scores.scale
        return torch.cat(dq, 1), dk.transpose(1, 2), dv.transpose(1, 2)

    def _chunks(self, q: Tensor) -> Iterator[slice]:
        for start in range(0, q.shape[1], self.rows):
            yield slice(start, min(start + self.rows, q.shape[1]))

    def _logits(self, q: Tensor, keys: Tensor, scores: Scores, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Masked scores [B, Hk, G·rows, N] and, where they are capped, the slope of the cap."""
        logits = _grouped(q[:, rows], keys.shape[1]) @ keys.mT * scores.scale
        slope = None
        if self.softcap is not None:
            bent = (logits / self.softcap).tanh()
            logits, slope = self.softcap * bent, 1 - bent.square()
        apart = logits.unflatten(2, (-1, rows.stop - rows.start))
        if scores.causal:
            later = torch.ones(apart.shape[-2:], dtype=torch.bool, device=q.device).triu(rows.start + 1)
            apart = apart.masked_fill(later, -torch.inf)
        if scores.bias is not None:
            own = scores.bias if scores.bias.shape[2] == 1 else scores.bias[:, :, rows]
            apart = apart + own.unsqueeze(2)
        return apart.flatten(2, 3), slope


def _heads_first(dim: int, *tensors: Tensor) -> Iterator[Tensor]:
    """[B, T, H, d] as [B, H, T, dim] in the compute dtype, padded with zeros."""
    for x in tensors:
        x = x.to(compute_dtype(x)).transpose(1, 2)
        x = x if x.shape[-1] == dim else pad(x, (0, dim - x.shape[-1]))
        # The operator looks at no stride of the last dim, and takes what lies there.
        yield x if x.stride(-1) == 1 else x.contiguous()


def _grouped(x: Tensor, heads: int) -> Tensor:
    """[B, T, H, D] as [B, heads, G·T, D] in the compute dtype: the G heads that share keys below one another."""
    return x.to(compute_dtype(x)).unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _ungrouped(x: Tensor, tokens: int) -> Tensor:
    """The inverse of `_grouped`."""
    return x.unflatten(2, (-1, tokens)).permute(0, 3, 1, 2, 4).flatten(2, 3)
