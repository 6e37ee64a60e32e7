"""Gradients that cannot be differentiated again, and say so."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def once_differentiable(backward: F) -> F:
    """The backward of an autograd.Function whose gradients raise RuntimeError where they are differentiated.

    Those of `torch.autograd.function.once_differentiable` do so for `.backward()` alone, and only if the incoming
    gradient is differentiated itself: a gradient penalty behind `y.sum()` would lack this function's part.
    """

    @wraps(backward)
    def call(ctx: Any, *grads: Tensor) -> Any:
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        ctx = _Context(ctx) if again else ctx
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not again:
            return found
        outputs = found if isinstance(found, tuple) else (found,)
        depends_on = [x for x in (*grads, *ctx.saved_tensors) if x is not None and x.requires_grad]
        return tuple(x if x is None else _Last.apply(x, *depends_on) for x in outputs)

    return call  # type: ignore[return-value]


class _Context:
    """That of a backward, whose saved tensors can be asked for twice: activation checkpointing makes them once."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    @cached_property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        found: tuple[Tensor | None, ...] = self._ctx.saved_tensors
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Last(torch.autograd.Function):
    """A gradient, and all that it depends on -> the gradient. No exchange."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("lasp's operations are differentiable once: a gradient of theirs cannot be differentiated")
