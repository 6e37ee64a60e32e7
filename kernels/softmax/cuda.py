"""Attention of one tile on a GPU: adapters to what PyTorch and the package flash-attn have.

Untested on a GPU: the machines that built this have none. Tests hold what each is given, and what is made of what it
returns, to the signature that it documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lasp.kernels.softmax.operators import Gradients, Scores

aten = torch.ops.aten


class CudaFlash:
    """PyTorch's flash attention for CUDA: fp16 and bf16, one head dim, a multiple of 8 and at most 256, no bias."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        q, k, v = (aligned(x).transpose(1, 2) for x in (q, k, v))
        output, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, scores.causal, scale=scores.scale)
        return output.transpose(1, 2), lse.transpose(1, 2)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, scores: Scores
    ) -> Gradients:
        rows, keys = q.shape[1], k.shape[1]
        grad, q, k, v, output = (aligned(x.to(q.dtype)).transpose(1, 2) for x in (grad, q, k, v, output))
        # Without dropout the state of the random generator is never read.
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        offset = torch.zeros((), dtype=torch.uint64, device=q.device)
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, output, lse.transpose(1, 2).contiguous(), None, None, rows, keys, 0.0, scores.causal,
            seed, offset, scale=scores.scale,
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class CudnnFlash:
    """cuDNN's attention, for cards since sm_90: fp16 and bf16, one head dim, a multiple of 8, at most 128; no bias."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        output, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            *_heads_alike(q, k, v), None, True, 0.0, scores.causal, scale=scores.scale
        )
        return output.transpose(1, 2), lse.view(lse.shape[:3]).transpose(1, 2)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, scores: Scores
    ) -> Gradients:
        heads, rows, keys = k.shape[2], q.shape[1], k.shape[1]
        seed, offset = torch.zeros(2, dtype=torch.int64, device=q.device).unbind()  # read with dropout alone
        grad, output = (aligned(x.to(q.dtype)).transpose(1, 2) for x in (grad, output))
        stats = lse.transpose(1, 2).contiguous().unsqueeze(-1)
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            grad, *_heads_alike(q, k, v), output, stats, seed, offset, None, None, None, rows, keys, 0.0, scores.causal,
            scale=scores.scale,
        )  # fmt: skip
        return dq.transpose(1, 2), _summed(dk, heads), _summed(dv, heads)


class CudaEfficient:
    """PyTorch's memory-efficient attention: fp32 too, keys and values of different dims, multiples of 8, no bias."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        output, lse, *_ = aten._scaled_dot_product_efficient_attention(
            *_heads_alike(q, k, v), None, True, 0.0, scores.causal, scale=scores.scale
        )
        return output.transpose(1, 2), lse[..., : q.shape[1]].transpose(1, 2)  # which has rows up to a multiple of 32

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, scores: Scores
    ) -> Gradients:
        heads, more = k.shape[2], -q.shape[1] % 32
        seed, offset = torch.zeros(2, dtype=torch.int64, device=q.device).unbind()  # read with dropout alone
        grad, output = (aligned(x.to(q.dtype)).transpose(1, 2) for x in (grad, output))
        sums = pad(lse.transpose(1, 2), (0, more), value=torch.inf).contiguous()
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, *_heads_alike(q, k, v), None, output, sums, seed, offset, 0.0, [True, True, True, False],
            scores.causal, scale=scores.scale,
        )  # fmt: skip
        return dq.transpose(1, 2), _summed(dk, heads), _summed(dv, heads)


@dataclass(frozen=True)
class FlashPackage:
    """The package flash-attn 2: fp16 and bf16, one head dim, a multiple of 8 and at most 256, no bias; softcap."""

    softcap: float | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_forward

        output, lse, *_ = _flash_attn_forward(*map(aligned, (q, k, v)), *self._options(scores), return_softmax=False)
        return output, lse.transpose(1, 2)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, scores: Scores
    ) -> Gradients:
        from flash_attn.flash_attn_interface import _flash_attn_backward

        grad, q, k, v, output = (aligned(x.to(q.dtype)) for x in (grad, q, k, v, output))
        found = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _flash_attn_backward(
            grad, q, k, v, output, lse.transpose(1, 2).contiguous(), *found, *self._options(scores), deterministic=False
        )
        return found

    def _options(self, scores: Scores) -> tuple[float, float, bool, int, int, float, None]:
        """Dropout, scale, causal, how far a query sees to both sides, softcap and slopes of positions."""
        return 0.0, scores.scale, scores.causal, -1, -1, self.softcap or 0.0, None


def aligned(x: Tensor) -> Tensor:
    """x in half precision, copied unless its rows are dense and begin at multiples of 16 bytes, the unit of loads."""
    dense = x.stride(-1) == 1 and all(n % 8 == 0 for n in (x.storage_offset(), *x.stride()[:-1]))
    return x if dense else x.clone(memory_format=torch.contiguous_format)


def _heads_alike(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """[B, H, T, D] each, keys and values repeated for the queries that share them."""
    share = q.shape[2] // k.shape[2]
    repeated = (q, *(x if share == 1 else x.repeat_interleave(share, 2) for x in (k, v)))
    return [aligned(x).transpose(1, 2) for x in repeated]


def _summed(grad: Tensor, heads: int) -> Tensor:
    """The gradient [B, N, heads, D] of what was repeated into grad [B, H, N, D]."""
    grad = grad.transpose(1, 2)
    return grad if grad.shape[2] == heads else grad.unflatten(2, (heads, -1)).sum(3)
