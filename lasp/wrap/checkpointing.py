"""Activation checkpointing: a layer that is computed again in backward is in the forward that it was first computed in.

Checkpoints call a layer's function a second time, when the model is maybe at another batch, or at none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from lasp.wrap.wiring import Wiring

# Where modules of transformers, and torch's CheckpointWrapper, keep the function that checkpoints.
_NAMES = ("_gradient_checkpointing_func", "checkpoint_fn")


class Checkpoint:
    """A function that checkpoints (`torch.utils.checkpoint.checkpoint`), of what is within a model's forward."""

    def __init__(self, original: Callable[..., Any], wiring: Wiring) -> None:
        self.original, self.wiring = original, wiring

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        wiring, forward = self.wiring, self.wiring.running
        if forward is None:
            return self.original(function, *args, **kwargs)

        def within(*inputs: Any, **named: Any) -> Any:
            with wiring.within(forward):
                return function(*inputs, **named)

        return self.original(within, *args, **kwargs)


def bind_checkpoints(modules: Iterable[nn.Module], wiring: Wiring) -> None:
    """Let all modules of a model that checkpoint do so within the forward; a user may have switched it on since."""
    for module in modules:
        for name in _NAMES:
            found = vars(module).get(name)
            if found is not None and getattr(found, "wiring", None) is not wiring:
                vars(module)[name] = Checkpoint(getattr(found, "original", found), wiring)


def release_checkpoints(module: nn.Module) -> None:
    """Undo `bind_checkpoints` for a module."""
    for name in _NAMES:
        if isinstance(found := vars(module).get(name), Checkpoint):
            vars(module)[name] = found.original
