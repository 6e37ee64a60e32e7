"""Tiles: what treats every token by itself takes some tokens at a time (ALST, arXiv:2506.13996)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lasp.kernels.arguments import check_integer, told
from lasp.kernels.chunks import ceil_div
from lasp.memory.checkpoints import is_trained, repeat
from lasp.memory.parts import is_mixture, tokenwise_parts
from lasp.wrap.swap import surround

Model = TypeVar("Model", bound=nn.Module)


def tile_mlp(model: Model, tokens: int = 2048) -> Model:
    """Let a model's MLPs, experts and norms take at most so many tokens at a time, and again in backward; in place.

    Between forward and backward they keep their input alone, and what is within them is that of one tile. Parameters
    get one gradient, the tiles' sum in the parameter's dtype, so DDP, FSDP2 and LoRA work as without. Dropout inside a
    tile draws for itself: other masks than without tiles, and not the same on any number of ranks. In training, where
    this rank has more tokens. For models of `lasp.models` and of Hugging Face; after `lasp.parallelize` and peft,
    before `lasp.data_parallel` and the optimizer. Returns the model. Raises ValueError for another number, and for a
    model in which no such module is known.
    """
    check_integer("tokens", tokens, least=1)
    parts = tokenwise_parts(model)
    if not parts:
        raise ValueError(f"{type(model).__name__} has no MLP, experts or norms that lasp knows by their names")
    for module in dict.fromkeys(parts):  # layers may share one
        surround(module, "forward", partial(_tiled, tokens))
    return model


def _tiled(tokens: int, original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    given = (*args, *kwargs.values())
    rows = _rows(given, 3 if is_mixture(module) else 1)
    if rows is None or rows <= tokens or not is_trained(module):
        return original(module, *args, **kwargs)
    parts = [_split(x, tokens) if isinstance(x, Tensor) else [x] * ceil_div(rows, tokens) for x in given]
    outputs = [
        repeat(original, module, tile[: len(args)], dict(zip(kwargs, tile[len(args) :], strict=True)))
        for tile in zip(*parts, strict=True)
    ]
    if not all(isinstance(output, Tensor) for output in outputs):
        raise ValueError(f"{type(module).__name__} returns {told(outputs[0])}, and tiles are put together as tensors")
    return torch.cat(outputs, -2).view(*given[0].shape[:-1], -1)


def _rows(given: tuple[Any, ...], tensors: int) -> int | None:
    """How many tokens a call is given, None where it is not so many tensors [B, T, ...] or [N, ...] of the same."""
    found = [x for x in given if isinstance(x, Tensor)]
    sizes = {x.shape[:-1].numel() if x.dim() in (2, 3) else None for x in found}
    return sizes.pop() if len(found) == tensors and len(sizes) == 1 and found[0] is given[0] else None


def _split(x: Tensor, tokens: int) -> tuple[Tensor, ...]:
    """[B, T, ...] as [1, tokens, ...], of all sequences one after the other; [N, ...] as [tokens, ...]."""
    return x.flatten(0, -2).split(tokens) if x.dim() == 2 else x.reshape(1, -1, x.shape[-1]).split(tokens, 1)
