"""The optimizer: AdamW whose decay spares the vectors, and its learning rate as a function of the step."""

import math

import torch
from torch import nn

from lasp.train.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters that are trained; only weight matrices decay, whatever shape decays and biases have."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = {name for name, parameter in named if name.endswith("weight") and parameter.dim() >= 2}
    groups = [
        {"params": [p for name, p in named if name in matrices], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if name not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate of a step (0-based): linear up to `lr`, then half a cosine down to `min_lr` at the last step.

    A warm-up that is as long as the run ends before its last step; a run of one step has `lr`.
    """
    warmup, last = min(config.warmup_steps, steps - 1), steps - 1
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / (last - warmup) if last > warmup else float(last > 0)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of parameters this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
