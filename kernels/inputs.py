"""What a linear recurrence is given, and the gradients of that."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V]; log_decay [H], [B, T, H] or [B, T, H, K], None for no decay;
    beta [B, T, H], what share of the held value a token erases, None where it erases nothing (the decay family)."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    beta: Tensor | None = None

    @property
    def trained(self) -> bool:
        """Whether the gates have a gradient: those of Lightning and RetNet are constants."""
        return self.log_decay is not None and bool(self.log_decay.requires_grad)


class Gradients(NamedTuple):
    """Gradients of inputs, or of a part of them; None for what there is not (yet).

    On the way they are [B, T, H, D], with D = 1 for beta and gates per head, and may have more heads than the input.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    log_decay: Tensor | None = None
    beta: Tensor | None = None

    def plus(self, rest: Gradients) -> Gradients:
        """What two parts of a backward pass come to."""
        return Gradients(*(_sum(a, b) for a, b in zip(self, rest, strict=True)))

    def like(self, inputs: Inputs) -> Gradients:
        """Each in its input's shape and dtype, summed over the states that share a head."""
        pairs = zip(self, inputs, strict=True)
        return Gradients(*(None if grad is None or x is None else _shaped(grad, x) for grad, x in pairs))


def _sum(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def _shaped(grad: Tensor, x: Tensor) -> Tensor:
    fixed = x.dim() == 1  # gates [H] of all tokens
    heads = x.shape[0 if fixed else 2]
    if grad.shape[2] != heads:
        grad = grad.unflatten(2, (heads, -1)).sum(3)
    if fixed:
        grad = grad.sum((0, 1))
    return grad.view(x.shape).to(x.dtype)
