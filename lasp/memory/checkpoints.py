"""Activation checkpointing: layers or mixers that keep their input alone, and are computed again in backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from lasp.kernels.arguments import check_choice, check_flags, check_integer
from lasp.memory.parts import layers_of, mixers_of
from lasp.wrap.checkpointing import Checkpoint
from lasp.wrap.swap import surround
from lasp.wrap.wiring import WIRING

Model = TypeVar("Model", bound=nn.Module)
Only = Literal["layers", "mixers"]


def checkpoint_activations(model: Model, *, every: int = 1, only: Only = "layers", offload: bool = False) -> Model:
    """Let a model in training keep the inputs of its layers alone, and compute these again in backward; in place.

    every: the first layer and every n-th after it. only: "layers", or in them nothing but what mixes tokens ("mixers").
    offload: keep the inputs in the CPU's memory (`torch.autograd.graph.save_on_cpu`); those of a model on the CPU are
    there already. Exchanges between ranks are repeated with the layer. For models of `lasp.models` and of Hugging Face;
    after `lasp.parallelize` and peft, before `lasp.data_parallel` and the optimizer. Returns the model. Raises
    ValueError for other values, and for a model without layers or mixers that are known.
    """
    check_integer("every", every, least=1)
    check_choice("only", only, get_args(Only))
    check_flags(offload=offload)
    chosen = layers_of(model)[::every]
    modules = chosen if only == "layers" else [mixer for layer in chosen for mixer in mixers_of(layer)]
    if not modules:
        raise ValueError(f"no mixer was found in the layers of {type(model).__name__}: {type(chosen[0]).__name__}")
    for module in dict.fromkeys(modules):  # layers may share one
        surround(module, "forward", partial(_checkpointed, offload))
    return model


def repeat(function: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`function(module, ...)`, again in backward, within the same forward of the model that the module belongs to."""
    count, names = len(args), tuple(kwargs)  # no tensor: it would stay here until backward, wherever its copy is kept

    def call(*given: Any) -> Any:
        return function(module, *given[:count], **dict(zip(names, given[count:], strict=True)))

    wiring = vars(module).get(WIRING)
    run = partial(checkpoint, use_reentrant=False)
    # By position all of them: a checkpoint saves tensors among those, and only what is saved is moved elsewhere.
    return (run if wiring is None else Checkpoint(run, wiring))(call, *args, *kwargs.values())


def is_trained(module: nn.Module) -> bool:
    """Whether there will be a backward pass worth to save memory for."""
    return module.training and torch.is_grad_enabled()


def _checkpointed(offload: bool, original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not is_trained(module):
        return original(module, *args, **kwargs)
    with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext():
        return repeat(original, module, args, kwargs)
