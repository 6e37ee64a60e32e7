"""What engines of PyTorch's own share: the optimizer is torch's, and parameters are tensors or DTensors."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lasp.parallel.gradients import clip_grad_norm_
from lasp.parallel.parameters import local_part
from lasp.train.config import TrainConfig
from lasp.train.engines.engine import Batch, Built, State, autocast
from lasp.train.optimizer import build_optimizers
from lasp.train.ranks import Ranks
from lasp.wrap.saving import tensors_of


class TorchEngine:
    """Forward and backward through `module`, which reduces the gradients by itself; then the optimizers."""

    def __init__(self, built: Built, config: TrainConfig, ranks: Ranks) -> None:
        self.model, self.config, self.ranks = built.model, config, ranks
        self.reduce_dtype = None if config.reduce_dtype is None else getattr(torch, config.reduce_dtype)
        self.module: Any = self._prepare(built.weights)
        self.optimizers = build_optimizers(self.model, config.optimizer)
        self._unfinite: list[str] = []

    def _prepare(self, weights: nn.Module | None) -> nn.Module:
        """What to call in the model's place. weights: of `Built`."""
        raise NotImplementedError

    def _gathering(self, last: bool) -> AbstractContextManager[Any]:
        """Around a micro-batch: whether its gradients are reduced with those of later ones."""
        return nullcontext()

    def backward(self, batch: Batch, last: bool) -> Tensor:
        with self._gathering(last):
            with autocast(self.config, self.ranks):
                loss: Tensor = self.module(**batch).loss
            loss.backward()
        return loss.detach()

    def update(self, lr: float, max_norm: float, skip: bool = False) -> float:
        # The reduced gradients are the same everywhere, and so is their norm: ranks agree without another exchange.
        norm = clip_grad_norm_(self.model, max_norm).item()
        if math.isfinite(norm) and not skip:
            self._step(lr)
            return norm
        norms = {name: self._own_norm(parameter) for name, parameter in self.model.named_parameters()}
        self._unfinite = [name for name, own in norms.items() if own is not None and not own.isfinite()]
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return norm

    def unfinite(self) -> list[str]:
        return self._unfinite

    def _own_norm(self, parameter: Any) -> Tensor | None:
        """Of what this rank has of a parameter's gradient, if it has any."""
        gradient = parameter.grad
        return None if gradient is None else torch.linalg.vector_norm(local_part(gradient))

    def _step(self, lr: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        self.module.eval()
        try:
            with autocast(self.config, self.ranks):
                loss: Tensor = self.module(**batch).loss
        finally:
            self.module.train()
        return loss

    def state(self) -> State:
        return State({name: value.detach() for name, value in tensors_of(self.model).items()}, self._kept())

    def load(self, read: Callable[[State], None]) -> None:
        self._make_state()
        try:
            read(self.state())
        except ValueError:
            for optimizer in self.optimizers:
                optimizer.state.clear()
            raise

    def _kept(self) -> dict[str, dict[str, Tensor]]:
        """What the optimizers keep of each parameter."""
        states: dict[Tensor, dict[str, Any]] = {p: s for o in self.optimizers for p, s in o.state.items()}
        named = {name: states.get(p, {}) for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: {k: v for k, v in own.items() if isinstance(v, Tensor)} for name, own in named.items()}

    def _make_state(self) -> None:
        """Let the optimizers make what they keep: a step of rate 0 without gradients moves nothing."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
        self._step(lr=0.0)
