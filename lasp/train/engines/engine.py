"""Engine: what the loop asks of whoever holds the model, its gradients and its optimizer."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lasp.train.config import TrainConfig
from lasp.train.ranks import Ranks

Batch = Mapping[str, Any]
"""Keywords of the model: this rank's tokens, their targets, the cut, and what the loss is divided by."""


class State(NamedTuple):
    """A model and its optimizer as one process would have them, whatever the engine and the number of ranks."""

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

    def update(self, lr: float, max_norm: float) -> float:
        """Scale the gradients down to this global norm where theirs is larger, update the parameters, and forget the
        gradients. Returns the norm that they had; nothing is updated where it is not finite."""

    def evaluate(self, batch: Batch) -> Tensor:
        """The loss of a batch, without gradients."""

    def state(self) -> State:
        """Everything that training changes, on the CPU of the main rank; the others get nothing."""

    def load(self, state: State, source: str) -> None:
        """Go on from a state. ValueError, naming `source` and what differs, when it is of another model."""


def autocast(config: TrainConfig, ranks: Ranks) -> AbstractContextManager[Any]:
    """Around a forward: bfloat16 computes in it, from weights that stay float32."""
    return torch.autocast(ranks.device.type, torch.bfloat16) if config.dtype == "bfloat16" else nullcontext()


def compare(source: str, found: dict[str, Any], expected: dict[str, Tensor]) -> None:
    """ValueError, naming the first that differ, unless `source` has tensors of these names, shapes and dtypes."""
    there, here = ({name: _described(value) for name, value in of.items()} for of in (found, expected))
    if differing := sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name)):
        told = "; ".join(f"{name} is {there.get(name)} there and {here.get(name)} here" for name in differing[:3])
        raise ValueError(f"{source!r} is of another model or dtype: {len(differing)} tensors differ: {told}")


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.layout is not torch.strided or value.is_meta:
        return f"{value.layout} on {value.device}"
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
