"""Engine: what the loop asks of whoever holds the model, its gradients and its optimizer."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lasp.train.config import TrainConfig
from lasp.train.ranks import Ranks

Batch = Mapping[str, Any]
"""Keywords of the model: this rank's tokens, their targets, the cut, and what the loss is divided by."""


class Built(NamedTuple):
    """A model before its first step, as an engine is given it."""

    model: nn.Module
    """The model, ready for this rank's tokens; of engines that share out its parameters on the meta device."""

    weights: nn.Module | None = None
    """Where it is on meta, and on the main rank: the plain model with its weights, which the engine takes out of it."""


class State(NamedTuple):
    """A model and its optimizer, under the same names whatever the engine and the number of ranks. A DTensor is this
    rank's part of what all have."""

    weights: dict[str, Tensor]
    """Parameters and persistent buffers by name, tied ones once."""

    optimizer: dict[str, dict[str, Tensor]]
    """Of each trained parameter, by its name: what the optimizer keeps, by the optimizer's names."""


class Engine(Protocol):
    """Prepares a model for its ranks, then builds the optimizer: sharding puts other parameters into the model.

    All ranks call every method together. Gradients are summed over sp and averaged over dp.
    """

    model: nn.Module
    """The model, with the names that a checkpoint has."""

    def backward(self, batch: Batch, last: bool) -> Tensor:
        """Add the gradients of a micro-batch; `last` of its step. Returns the loss, a scalar."""

    def update(self, lr: float, max_norm: float, skip: bool = False) -> float:
        """Scale the gradients down to this global norm where theirs is larger, update the parameters, and forget the
        gradients. Returns the norm that they had. Nothing is updated where it is not finite, nor with `skip`."""

    def unfinite(self) -> list[str]:
        """After an update that was none: the parameters whose gradients on this rank were not finite; before they were
        summed over the ranks where the engine sees those, and none where it sees neither."""

    def evaluate(self, batch: Batch) -> Tensor:
        """The loss of a batch, without gradients."""

    def state(self) -> State:
        """Everything that training changes, as it lies on the ranks; what one rank alone has, the others leave out."""

    def load(self, read: Callable[[State], None]) -> None:
        """Go on from a state, which `read` compares with the tensors it is given, and then puts into them. Where it
        raises ValueError, nothing was loaded. Nothing was trained before."""


def autocast(config: TrainConfig, ranks: Ranks) -> AbstractContextManager[Any]:
    """Around a forward: bfloat16 computes in it, from weights that stay float32."""
    return torch.autocast(ranks.device.type, torch.bfloat16) if config.dtype == "bfloat16" else nullcontext()


def compare(source: str, found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """ValueError, naming the first that differ, unless `source` has these names with the same shapes and dtypes."""
    there, here = ({name: _described(value) for name, value in of.items()} for of in (found, expected))
    if differing := sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name)):
        told = "; ".join(f"{name} is {there.get(name)} there and {here.get(name)} here" for name in differing[:3])
        raise ValueError(f"{source!r} is of another model or dtype: {len(differing)} tensors differ: {told}")


def flatten(kept: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What an optimizer keeps, in one table."""
    return {f"{name}: {key}": value for name, own in kept.items() for key, value in own.items()}


def _described(value: Any) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
