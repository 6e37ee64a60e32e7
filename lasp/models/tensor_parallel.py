"""Tensor parallelism: each mixer's heads and each feed-forward's channels, shared out over an axis of the mesh.

A rank's part of a block is a block with its share of the heads: from that one's shapes follows which dim of a parameter
is cut. Around each mixer and each feed-forward stands one sum over the ranks in each direction (Megatron-LM, arXiv
1909.08053, section 3). All else (embedding, head, norms) is the same on every rank, which reads the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from lasp.layers import DeltaProduct, Mixer, MixtureOfMemories
from lasp.layers.short_conv import ShortConv
from lasp.models.blocks import Block
from lasp.models.config import LinearLlamaConfig
from lasp.parallel.tensor import enter, leave
from lasp.wrap.swap import surround

Model = TypeVar("Model", bound=nn.Module)


def check_heads(config: Any, ranks: int) -> None:
    """ValueError for a model whose heads and channels so many ranks cannot share."""
    if not isinstance(config, LinearLlamaConfig):
        raise ValueError(f"tp = {ranks} shares out the heads of Linear-Llama3, not of {type(config).__name__}")
    heads = config.num_attention_heads
    counts = {
        "num_attention_heads": heads,
        "num_key_value_heads": config.num_key_value_heads or heads,
        "intermediate_size": config.intermediate_size,
    }
    if told := [f"{name} = {count}" for name, count in counts.items() if count % ranks]:
        raise ValueError(f"tp = {ranks} does not divide the model's {' and '.join(told)}")
    if "mamba" in config.layer_mixers:
        raise ValueError(f"tp = {ranks}: the channels of mamba are not heads, its gates are of all of them")
    if "hgrn2" in config.layer_mixers and config.options_of("hgrn2").get("learned_bounds"):
        raise ValueError(f"tp = {ranks}: the learned bounds of hgrn2 are of all heads, set its learned_bounds to false")
    if "mom" in config.layer_mixers and config.options_of("mom").get("balance"):
        raise ValueError(f"tp = {ranks}: the balance loss of mom is one of all heads, set its balance to 0")


def share_heads(model: Model, mesh: DeviceMesh) -> Model:
    """Give this rank its part of the blocks of a Linear-Llama3, over a mesh of one dim; in place, after
    `lasp.parallelize`, before levers on memory. Parameters that are cut become DTensors. Returns the model. ValueError
    as `check_heads`."""
    config: Any = model.config
    check_heads(config, mesh.size())
    plan: dict[str, ParallelStyle] = {}
    with torch.device("meta"):
        for index, name in _blocks(model):
            part = Block(share_of(config, mesh.size()), index)
            plan |= {f"{name}.mixer": Shared(part.mixer), f"{name}.mlp": Shared(part.mlp)}
    parallelize_module(model, mesh, plan)
    return model


def share_of(config: LinearLlamaConfig, ranks: int) -> LinearLlamaConfig:
    """The configuration of blocks with one rank's heads and channels."""
    share, heads = copy(config), config.num_attention_heads
    share.num_attention_heads = heads // ranks
    share.num_key_value_heads = (config.num_key_value_heads or heads) // ranks
    share.head_dim = config.head_dim or config.hidden_size // heads
    share.intermediate_size = config.intermediate_size // ranks
    return share


class Shared(ParallelStyle):
    """Parallel style of a module whose outputs add up over the ranks to those of the whole.

    part: the same module with one rank's heads or channels, on the meta device.
    """

    def __init__(self, part: nn.Module) -> None:
        self.part = part

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        rank, size = device_mesh.get_local_rank(), device_mesh.size()
        places = list(cut_parameters(module, self.part, rank, size))
        for place in places:
            whole: Any = place.owner._parameters[place.name]
            if place.dim is not None and place.index is None:
                cut = distribute_tensor(whole.detach(), device_mesh, [Shard(place.dim)], src_data_rank=None)
                place.owner.register_parameter(place.name, nn.Parameter(cut, requires_grad=whole.requires_grad))
        take_heads(module, rank, size)
        group = device_mesh.get_group()

        def forward(original: Callable[..., Any], module: nn.Module, x: Tensor, **context: Any) -> Any:
            with parameters_of(places, lambda whole: enter(whole, group)):
                result = original(module, enter(x, group), **context)
            if isinstance(result, Tensor):
                return leave(result, group)
            return leave(result[0], group), result[1]

        surround(module, "forward", forward)
        return module


@dataclass(frozen=True)
class Place:
    """Where a parameter stands, and how the ranks share it."""

    owner: nn.Module
    name: str

    dim: int | None
    """The dim that is cut, None for a parameter of all heads."""

    index: Tensor | None = None
    """What a rank has of a dim that is several ranges one after the other, each of them cut: such a parameter stays
    whole on every rank."""


def cut_parameters(whole: nn.Module, part: nn.Module, rank: int, size: int) -> Iterator[Place]:
    """How the parameters of a module are shared, by what another one has with so many times fewer heads."""
    ranges = _ranges(whole)
    for path, module in whole.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            other = part.get_parameter(f"{path}.{name}".lstrip("."))
            cut = [dim for dim in range(parameter.dim()) if parameter.shape[dim] != other.shape[dim]]
            assert len(cut) < 2, "heads and channels are one dim of a parameter"
            lengths = ranges.get(f"{path}.{name}".lstrip("."))
            index = None if lengths is None else _index(lengths, rank, size)
            yield Place(module, name, cut[0] if cut else None, index)


def take_heads(module: nn.Module, rank: int, size: int) -> None:
    """Tell a mixer which of its heads are this rank's."""
    if isinstance(module, Mixer):
        heads = module.num_kv_heads // size
        module.own = slice(rank * heads, (rank + 1) * heads)


@contextmanager
def parameters_of(places: list[Place], enter: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, modules have this rank's part of each parameter. enter: what sums up the gradient of a whole one."""
    held: list[Any] = [place.owner._parameters[place.name] for place in places]
    try:
        for place, tensor in zip(places, held, strict=True):
            own: Any = tensor.to_local() if hasattr(tensor, "to_local") else enter(tensor)
            own = own if place.index is None else own[place.index.to(own.device)]
            place.owner._parameters[place.name] = own
        yield
    finally:
        for place, tensor in zip(places, held, strict=True):
            place.owner._parameters[place.name] = tensor


def _blocks(model: nn.Module) -> Iterator[tuple[int, str]]:
    names = (name for name, module in model.named_modules() if isinstance(module, Block))
    return enumerate(names)


def _ranges(module: nn.Module) -> dict[str, list[int]]:
    """Of the parameters whose first dim is not one range of heads: the ranges' lengths."""
    found: dict[str, list[int]] = {}
    steps = 1
    if isinstance(module, DeltaProduct):
        steps, names = module.num_householder, ["k_proj.weight", "v_proj.weight", "beta_proj.weight"]
    elif isinstance(module, MixtureOfMemories):
        steps = module.num_memories + 1
        names = [f"{name}.weight" for name in ("k_proj", "v_proj", "beta_proj", "decay_proj")] + ["dt_bias", "A_log"]
    if steps > 1:
        found = {name: [len(module.get_parameter(name)) // steps] * steps for name in names}
    if isinstance(module, Mixer) and isinstance(module.short_conv, ShortConv):
        paths = {id(linear): f"{name}.weight" for name, linear in module.named_children()}
        widths = {paths[id(linear)]: linear.out_features for linear in module.projections}
        found["short_conv.weight"] = [n for name, width in widths.items() for n in found.get(name, [width])]
    return found


def _index(lengths: list[int], rank: int, size: int) -> Tensor:
    """This rank's part of each of some ranges that follow one another."""
    parts, start = [], 0
    for length in lengths:
        own = length // size
        parts.append(torch.arange(start + rank * own, start + (rank + 1) * own))
        start += length
    return torch.cat(parts)
