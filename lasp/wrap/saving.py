"""save_pretrained: a model in the files of Hugging Face, whole, from however many ranks hold it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasp.parallel.group import join_world


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Write a model as its own `save_pretrained` does, whole also where ranks hold shares of it (FSDP2, tensor
    parallelism). All ranks call it.

    Tensors are put together one at a time, on the CPU of rank 0, which alone has the whole model, and writes it. Around
    a model of peft these are the adapters. A DistributedDataParallel is seen through. All ranks return when the files
    are there; where they cannot be written all of them raise ValueError.
    """
    target: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if not hasattr(target, "save_pretrained"):
        raise ValueError(f"{type(target).__name__} is no model of transformers or peft: it has no save_pretrained")
    world = join_world() if dist.is_initialized() else None
    main, error = world is None or world.rank == 0, None
    whole = {name: to_cpu(value, main) for name, value in tensors_of(target).items()}
    if main:
        try:
            target.save_pretrained(folder, state_dict=whole)
        except Exception as found:  # every library has its own ways to fail
            error = f"cannot save to {str(folder)!r}: {(str(found) or type(found).__name__).splitlines()[0]}"
            if world is None:
                raise ValueError(error) from found
    if world is not None:
        world.agree("save_pretrained", {}, error).wait()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds: parameters and persistent buffers, tied ones under their first name; around a model
    that stays as it is, what is trained and all adapters, frozen ones and those of another task too."""
    named: dict[str, Tensor] = model.state_dict(keep_vars=True)
    if hasattr(model, "peft_config"):
        adapters = _adapters(model, named)
        named = {name: value for name, value in named.items() if value.requires_grad or id(value) in adapters}
    first = {id(value): name for name, value in reversed(named.items())}
    return {name: value for name, value in named.items() if first[id(value)] == name}


def _adapters(model: Any, named: dict[str, Tensor]) -> set[int]:
    """The ids of those tensors that peft writes of a model's adapters."""
    from peft import get_peft_model_state_dict

    written: list[dict[str, Tensor]] = [
        get_peft_model_state_dict(model, state_dict=dict(named), adapter_name=adapter, save_embedding_layers=False)
        for adapter in model.peft_config
    ]
    return {id(value) for adapter in written for value in adapter.values()}


def to_cpu(value: Tensor, main: bool) -> Tensor:
    """The whole of a tensor, which all ranks may have to put together, on the CPU of the main rank."""
    whole: Any = value.detach()
    whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole  # DTensor takes a while to import
    return whole.cpu() if main else torch.empty(0)
