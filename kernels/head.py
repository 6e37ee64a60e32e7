"""The log-probability of every token's label under a linear head, without the logits [tokens, vocabulary] in memory.

`log p(label) = z[label] - logsumexp(z)`, `z = steps(hidden @ weight.T + bias)`. Tiles of the logits are computed one
after the other, and again in backward, for which one number per token is kept (Cut Cross-Entropy, arXiv:2411.09009).
torch 2.13 has `linear_cross_entropy` with chunks: it rounds the loss of bf16 inputs to bf16, adds up the weight's
gradient in bf16, and takes no softcap; 2.11 has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lasp.kernels.once import once_differentiable
from lasp.kernels.precision import compute_dtype, exact

Step = Callable[[Tensor], Tensor]
TOKENS, CLASSES = 2048, 4096  # of a tile: 32 MB in fp32


def label_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int = -100,
    dtype: torch.dtype | None = None,
    steps: tuple[Step, ...] = (),
) -> Tensor:
    """[...], in fp32 (fp64 for fp64 hidden states); 0 without a gradient where the label is ignore_index.

    hidden [..., D], weight [V, D], bias [V], labels [...] in 0..V - 1 or ignore_index. dtype: of the matrix products,
    by default hidden's; the weight's gradient is added up in fp32. steps: what the model does to each logit before the
    softmax (a scale, a softcap).
    """
    ignored = labels == ignore_index
    found: Tensor = _LabelLogProbs.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        labels.masked_fill(ignored, 0).flatten(),
        ignored.flatten(),
        hidden.dtype if dtype is None else dtype,
        steps,
    )
    return found.view(labels.shape)


class _Tile(NamedTuple):
    """Some of a head's tokens and classes: hidden [n, D], weight [c, D] and bias [c] in the dtype of the products,
    place [n, 1] of each token's label among these classes, inside [n, 1] whether it is one of them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    place: Tensor
    inside: Tensor
    steps: tuple[Step, ...]

    def product(self) -> Tensor:
        """[n, c], as the model's head makes it."""
        return linear(self.hidden, self.weight, self.bias)

    def logits(self, product: Tensor) -> Tensor:
        for step in self.steps:
            product = step(product)
        return product.to(compute_dtype(product))

    def gradient(self, sums: Tensor, grad: Tensor) -> Tensor:
        """Of the product, [n, c]. sums: log of the sum of exponentials, grad: of the log-probabilities, [n, 1]."""
        product = self.product()
        with torch.enable_grad():
            logits = self.logits(product.requires_grad_(bool(self.steps)))
        found = (logits.detach() - sums).exp_().mul_(-grad)
        found.scatter_add_(1, self.place, torch.where(self.inside, grad, 0))
        return torch.autograd.grad(logits, product, found)[0] if self.steps else found


class _Head(NamedTuple):
    """hidden [N, D], weight [V, D], bias [V], labels [N] in 0..V - 1."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    dtype: torch.dtype
    steps: tuple[Step, ...]

    def classes(self) -> Iterator[slice]:
        return _slices(self.weight.shape[0], CLASSES)

    def tokens(self) -> Iterator[slice]:
        return _slices(self.hidden.shape[0], TOKENS)

    def tile(self, tokens: slice, classes: slice) -> _Tile:
        bias = None if self.bias is None else self.bias[classes].to(self.dtype)
        hidden, weight = self.hidden[tokens].to(self.dtype), self.weight[classes].to(self.dtype)
        place = self.labels[tokens].unsqueeze(1) - classes.start
        inside = (place >= 0) & (place < len(weight))
        return _Tile(hidden, weight, bias, place.clamp(0, len(weight) - 1), inside, self.steps)


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, size, step))


class _LabelLogProbs(torch.autograd.Function):
    """
    | | shape | gradient |
    |---|---|---|
    | hidden | [N, D] | [N, D] |
    | weight, bias | [V, D], [V] | of these tokens |
    | labels, ignored | [N] | none |
    | returned | [N] | [N] |

    No collective in either direction.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignored: Tensor, *how: Any
    ) -> Tensor:
        head = _Head(hidden, weight, bias, labels, *how)
        sums = hidden.new_full((len(hidden), 1), -torch.inf, dtype=compute_dtype(hidden))
        chosen = torch.zeros_like(sums)
        with exact(hidden):
            for classes in head.classes():
                for tokens in head.tokens():
                    tile = head.tile(tokens, classes)
                    logits = tile.logits(tile.product())
                    chosen[tokens] = torch.where(tile.inside, logits.gather(1, tile.place), chosen[tokens])
                    sums[tokens] = torch.logaddexp(sums[tokens], logits.logsumexp(1, keepdim=True))
        ctx.save_for_backward(hidden, weight, bias, labels, ignored, sums)
        ctx.how = how
        return (chosen - sums).squeeze(1).masked_fill(ignored, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, ignored, sums = ctx.saved_tensors
        head, grad = _Head(hidden, weight, bias, labels, *ctx.how), grad.masked_fill(ignored, 0).unsqueeze(1)
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(x, dtype=dtype) if wanted else None
            for x, wanted, dtype in zip(
                (hidden, weight, bias), ctx.needs_input_grad[:3], (sums.dtype, weight.dtype, sums.dtype), strict=True
            )
        )
        with exact(hidden):
            for classes in head.classes():  # outside, so that a slice of the weight's gradient is summed in fp32
                summed = None if of_weight is None else torch.zeros_like(weight[classes], dtype=sums.dtype)
                for tokens in head.tokens():
                    tile = head.tile(tokens, classes)
                    found = tile.gradient(sums[tokens], grad[tokens])
                    if of_bias is not None:
                        of_bias[classes] += found.sum(0)
                    found = found.to(head.dtype)
                    if of_hidden is not None:
                        _add_product(of_hidden[tokens], found, tile.weight)
                    if summed is not None:
                        _add_product(summed, found.mT, tile.hidden)
                if of_weight is not None and summed is not None:
                    of_weight[classes] = summed
        return (
            None if of_hidden is None else of_hidden.to(hidden.dtype),
            of_weight,
            None if of_bias is None else of_bias.to(bias.dtype),
            *[None] * 4,
        )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the dtype of total."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
