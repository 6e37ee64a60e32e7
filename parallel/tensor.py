"""Into and out of a stretch of a model whose parameters the ranks of an axis share (tensor parallelism).

All ranks have the same tensor outside. Inside, each computes with its own parameters, and the outputs add up.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from lasp.kernels.once import once_differentiable
from lasp.parallel import collectives


def enter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The same tensor [...]; its gradient is the sum of what the ranks find."""
    return _Enter.apply(x, group)


def leave(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' tensors [...], on every rank."""
    return _Leave.apply(x, group)


class _Enter(Function):
    """
    |          | in    | out   | exchange             |
    |----------|-------|-------|----------------------|
    | forward  | [...] | [...] | none                 |
    | backward | [...] | [...] | all-reduce over tp   |
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return collectives.all_reduce(_copy(gradient), ctx.group, "backward").wait(), None


class _Leave(Function):
    """
    |          | in    | out   | exchange             |
    |----------|-------|-------|----------------------|
    | forward  | [...] | [...] | all-reduce over tp   |
    | backward | [...] | [...] | none                 |
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return collectives.all_reduce(_copy(x), group, "forward").wait()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _copy(x: Tensor) -> Tensor:
    """To be summed in place."""
    return x.clone(memory_format=torch.contiguous_format)
