"""Optimizers whose decay spares the vectors, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lasp.train.config import OptimizerConfig
from lasp.train.lion import Lion


def build_optimizers(model: Any, config: OptimizerConfig) -> list[Optimizer]:
    """Optimizers that share out all parameters that are trained; only weight matrices decay, whatever shape decays and
    biases have. Muon takes the matrices between embedding and head, AdamW the rest."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if config.name == "adamw":
        return [_adamw(trained, config)]
    if config.name == "lion":
        return [Lion(_groups(trained, config), lr=config.lr, betas=config.betas)]
    if config.name == "adafactor":
        return [torch.optim.Adafactor(_groups(trained, config), lr=config.lr)]
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    inner = {name: p for name, p in trained.items() if _is_matrix(name, p) and p.dim() == 2 and id(p) not in ends}
    # Updates as large as AdamW's, so that one rate and one decay serve both.
    muon = torch.optim.Muon(
        inner.items(), lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    rest = {name: parameter for name, parameter in trained.items() if name not in inner}
    return [muon, _adamw(rest, config)] if rest else [muon]


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate of a step (0-based): linear up to `lr`, then by `schedule`; `min_lr` at the last step.

    A warm-up that is as long as the run ends before its last step; a run of one step has `lr`.
    """
    warmup, last = min(config.warmup_steps, steps - 1), steps - 1
    if step < warmup:
        return config.lr * (step + 1) / warmup
    first = max(warmup, last - config.decay_steps) if config.schedule == "wsd" else warmup
    progress = (step - first) / (last - first) if last > first else float(last > 0)
    return config.min_lr + (config.lr - config.min_lr) * _SHAPES[config.schedule](min(1.0, max(0.0, progress)))


_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
    "wsd": lambda progress: 1 - progress,
}
"""What is left of lr - min_lr, by the progress from the end of the warm-up, or the start of a decay, to the last."""


def _adamw(trained: Mapping[str, Tensor], config: OptimizerConfig) -> Optimizer:
    return torch.optim.AdamW(_groups(trained, config), lr=config.lr, betas=config.betas, fused=True)


def _groups(trained: Mapping[str, Tensor], config: OptimizerConfig) -> list[dict[str, Any]]:
    groups: dict[tuple[bool, Any], list[Tensor]] = {}
    for name, parameter in trained.items():
        # Operations on many tensors take those of one mesh at a time.
        groups.setdefault((_is_matrix(name, parameter), getattr(parameter, "device_mesh", None)), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda group: not group[0][0])
    return [{"params": own, "weight_decay": config.weight_decay * decays} for (decays, _), own in ordered]


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a weight matrix; those of an expert stack are called after their projection."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # of what DeepSpeed has shared out
    return len(shape) >= 2 and name.endswith(("weight", "gate_up_proj", "down_proj"))
