"""Lion keeps one moment, and moves every weight by the same amount (arXiv 2302.06675, algorithm 2)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lion(Optimizer):
    """`w -= lr·(sign(β1·m + (1 - β1)·g) + decay·w)`, then `m = β2·m + (1 - β2)·g`. Its rate is a third to a tenth of
    AdamW's, its decay as many times larger."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            (ahead, kept), lr = group["betas"], group["lr"]
            for weight in (parameter for parameter in group["params"] if parameter.grad is not None):
                gradient, state = weight.grad, self.state[weight]
                moment: Tensor = state.setdefault("exp_avg", torch.zeros_like(weight))
                update = moment.lerp(gradient, 1 - ahead).sign_()
                weight.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr)
                moment.lerp_(gradient, 1 - kept)
        return loss
