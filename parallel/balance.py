"""How evenly a router uses what it can choose, over the whole sequence: a loss that asks for balance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lasp.parallel import collectives
from lasp.parallel.call import Turn


def router_balance(turn: Turn, scores: Tensor, chosen: Tensor, mask: Tensor | None = None) -> Tensor:
    """`M·sum_m f_m·P_m`, the loss of Switch Transformers (arXiv:2101.03961, equations 4 to 6), k where all is even.

    f_m: how many tokens of the whole sequence are sent to choice m, on average; P_m: its mean score. scores [B, T, M];
    chosen [B, T, k]; mask [B, T] bool: False tokens do not count. Returns the value of the whole sequence, with the
    gradient of this rank's part of it. One all-reduce of 2 M + 1 numbers, forward alone.
    """
    choices = scores.shape[-1]
    counted = torch.ones_like(scores[..., 0]) if mask is None else mask.to(scores.dtype)
    own = (scores * counted.unsqueeze(-1)).sum((0, 1))
    sent = (one_hot(chosen, choices).sum(2) * counted.unsqueeze(-1)).sum((0, 1))
    sums = torch.cat([own.detach(), sent, counted.sum().unsqueeze(0)]).double()  # which holds any count
    if turn.group is not None:
        turn()
        with turn.forward():
            sums = collectives.all_reduce(sums, turn.process_group, "forward").wait()
    tokens = sums[-1].clamp(min=1)
    slope = choices * sums[choices:-1] / tokens.square()
    whole: Tensor = _OwnPart.apply(own, slope.to(own.dtype), (slope * sums[:choices]).sum().to(own.dtype))
    return whole


class _OwnPart(torch.autograd.Function):
    """own, slope [M], value [] -> value []; the gradient is that of `slope·own`. No exchange in either direction."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, slope: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


def beside(output: Tensor, loss: Tensor) -> Tensor:
    """`output` as it is; what is differentiated through it also sends a gradient of 1 into `loss` []."""
    joined: Tensor = _Beside.apply(output, loss)
    return joined


class _Beside(torch.autograd.Function):
    """output [...], loss [] -> output [...]; gradients: the output's, and 1. No exchange in either direction."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)
