"""Weights that one rank has, handed out: into a model on the meta device, of whose parameters each rank holds a share.

They go tensor by tensor, in slabs of a few rows, and are let go behind: the machine holds one whole copy, whatever the
number of ranks.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lasp.parallel import collectives
from lasp.parallel.group import SequenceGroup

_SLAB = 1 << 20  # bytes, or one row where that is longer


@torch.no_grad()
def hand_out(
    model: nn.Module, whole: nn.Module | None, ranks: SequenceGroup, device: torch.device, *, offload: bool = False
) -> None:
    """Fill a model on meta with the parameters and buffers of `whole`, which rank 0 has, in place. All ranks call it.

    whole: the same model with its weights, none of which it keeps; None on the other ranks. Parameters are DTensors, of
    which each rank gets its part; tied ones stay so. What one rank has read or drawn is the same at any number of them.
    device: where the model goes, but for its parameters where `offload` keeps them on the CPU. ValueError where a
    module has a tensor that is neither parameter nor buffer and was never computed.
    """
    ties = [places for places in _places(model).values() if len(places) > 1]
    model.to_empty(device="cpu" if offload else device)
    for (first, name), *others in ties:
        for module, other in others:
            module._parameters[other] = first._parameters[name]
    given = dict(whole.named_parameters()) if whole is not None else {}
    for name, target in model.named_parameters():
        source = None if whole is None else given[name]
        for start, slab in _slabs(source, target, ranks, device):
            _keep(target, start, slab)
        if source is not None:
            source.data = source.new_empty(0)
    hand_out_buffers(model, whole, ranks, device)


@torch.no_grad()
def hand_out_buffers(model: nn.Module, whole: nn.Module | None, ranks: SequenceGroup, device: torch.device) -> None:
    """`hand_out` for what is no parameter, of which every rank holds all."""
    given = dict(whole.named_buffers(remove_duplicate=False)) if whole is not None else {}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                source = None if whole is None else given[f"{path}.{name}".lstrip(".")]
                module._buffers[name] = _send(source, buffer.shape, buffer.dtype, ranks, device)
        if lost := [name for name, value in vars(module).items() if isinstance(value, Tensor) and value.is_meta]:
            raise ValueError(
                f"{path}.{lost[0]} is neither a parameter nor a buffer: a model of it cannot be built without memory, "
                'take engine = "ddp"'
            )


class OneByOne(nn.Module):
    """What is asked for its parameters gives a model on meta its own, each when the one before was dealt with: those of
    `whole` on the rank that has it, memory without values on the others."""

    def __init__(self, model: nn.Module, whole: nn.Module | None, device: torch.device) -> None:
        super().__init__()
        self.given = dict(whole.named_parameters()) if whole is not None else {}
        self.named, self.places, self.device = dict(model.named_parameters()), _places(model), device

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        while self.named:
            name, before = self.named.popitem()
            source = self.given.pop(name, before)
            value = torch.empty_like(before, device=self.device) if source is before else source.to(self.device)
            made = nn.Parameter(value.detach(), requires_grad=before.requires_grad)
            for module, key in self.places[id(before)]:
                module._parameters[key] = made
            source.data = source.new_empty(0)
            yield made


def _slabs(
    source: Tensor | None, target: Tensor, ranks: SequenceGroup, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """All rows of a tensor, some at a time, behind the number of those before them."""
    rows, *row = target.shape
    step = max(1, _SLAB // max(1, math.prod(row) * target.element_size()))
    for start in range(0, rows, step):
        part = None if source is None else source[start : start + step]
        yield start, _send(part, (min(step, rows - start), *row), target.dtype, ranks, device)


def _send(
    source: Tensor | None, shape: Sequence[int], dtype: torch.dtype, ranks: SequenceGroup, device: torch.device
) -> Tensor:
    """What rank 0 has of a tensor, on every rank's device."""
    tensor = torch.empty(shape, dtype=dtype, device=device) if source is None else source.detach().to(device, dtype)
    if ranks.rank:
        collectives.record("broadcast", "parameters", tensor.nbytes, 1)
    return collectives.broadcast(tensor, 0, ranks.process_group).wait()


def _keep(target: Any, start: int, slab: Tensor) -> None:
    """Put into this rank's part of a DTensor what it has of some rows."""
    (own,) = target.__create_chunk_list__()  # of the protocol that distributed checkpoints ask
    first, end = max(start, own.offsets[0]), min(start + len(slab), own.offsets[0] + own.sizes[0])
    if first < end:
        others = (slice(offset, offset + size) for offset, size in zip(own.offsets[1:], own.sizes[1:], strict=True))
        rows = slab[(slice(first - start, end - start), *others)]
        target.to_local()[first - own.offsets[0] : end - own.offsets[0]].copy_(rows)


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each parameter of a model stands: tied ones in several places."""
    places = defaultdict(list)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places[id(parameter)].append((module, name))
    return places
