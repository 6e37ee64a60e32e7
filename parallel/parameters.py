"""The parameters of a model: agreed on by the ranks that hold the same ones, and their values compared."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasp.parallel import collectives
from lasp.parallel.agreement import Disagreement
from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.group import MODEL_AXES, SequenceGroup

# Wrappers and mixins, by name: importing FSDP takes a second. Their backward reduces gradients by itself.
_REDUCING = {"DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel", "DeepSpeedEngine"}
# A checksum reads numbers as integers of their size.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Parameters(NamedTuple):
    """What an operation on a model found on this rank, and the options that all ranks must share."""

    named: dict[str, Tensor]
    options: dict[str, Any]


class Reduced:
    """A hook that does nothing but name the wrapper whose backward reduces a parameter's gradient."""

    __torch_unserializable__ = True

    def __init__(self, wrapper: nn.Module) -> None:
        self.wrapper = weakref.ref(wrapper)

    def __call__(self, incoming: Tensor) -> None:
        return None


def outline(model: nn.Module) -> str:
    """A model's class, and a hash of its parameters' names, shapes and dtypes and of its configuration."""
    said = [f"{name} {list(p.shape)} {p.dtype}" for name, p in model.named_parameters()]
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):  # but for where it came from
        said += [f"{name} {value}" for name, value in config.to_dict().items() if not name.startswith("_")]
    return f"{type(model).__name__} ({hashlib.sha256(' '.join(said).encode()).hexdigest()[:16]})"


def replicas_of(group: SequenceGroup) -> SequenceGroup:
    """The ranks that hold the same parameters as this one."""
    if not isinstance(group, SequenceGroup):
        raise ValueError(f"group must be a lasp.SequenceGroup, got {type(group).__name__}")
    return group.replicas


def parameters_of(model: nn.Module, ranks: SequenceGroup) -> dict[str, Tensor]:
    """The parameters of a model by name, all held alike by `ranks`.

    Raises ValueError where there is none, where they are sharded over these ranks, and where backward reduces their
    gradients by itself.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    named: dict[str, Tensor] = dict(model.named_parameters())
    if not named:
        raise ValueError(f"{type(model).__name__} has no parameters")
    reducing = {base.__name__ for module in model.modules() for base in type(module).__mro__} & _REDUCING
    if any(hook.wrapper() is not None for parameter in named.values() for hook in hooks_of(parameter, Reduced)):
        reducing.add("DistributedDataParallel")
    if reducing:
        raise ValueError(
            f"{type(model).__name__} is under {', '.join(sorted(reducing))}, whose backward reduces its gradients by "
            "itself: neither lasp.sync_gradients nor lasp.data_parallel comes after that"
        )
    _refuse_sharded(named, ranks)
    return named


def hooks_of(parameter: Tensor, kind: type) -> list[Any]:
    """The hooks of one kind that wait for a parameter's gradient."""
    return [hook for hook in (parameter._backward_hooks or {}).values() if isinstance(hook, kind)]


def agree_on_parameters(
    ranks: SequenceGroup | None, operation: str, find: Callable[[], Parameters]
) -> dict[str, Tensor]:
    """Begin an operation on a model: the parameters that `find` finds, where all ranks found alike.

    Alike is the operation, its options, and the number, shapes, dtypes, devices' types and order of the parameters, and
    which of them are trained. One header; a further exchange only names the first parameter that differs. Whatever
    `find` raises is raised as ValueError on every rank.
    """
    named: dict[str, Tensor] = {}
    lines: list[str] = []

    def check() -> Arguments:
        found = find()
        named.update(found.named)
        lines.extend(_describe(name, parameter) for name, parameter in named.items())
        said = f"{len(lines)} ({hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:16]})"
        return Arguments({**found.options, "parameters": said}, 1)

    try:
        begin_call(ranks, operation, check)()
        return named
    except Disagreement as error:
        if ranks is None or error.field != "parameters":
            raise
    _tell_first_difference(ranks, lines)
    raise AssertionError("the lines differ, so their hashes do")


def replicated(model: nn.Module, ranks: SequenceGroup) -> dict[str, Tensor]:
    """The parameters of a model in training that all of some ranks hold whole."""
    members = set(dist.get_process_group_ranks(ranks.process_group))
    named = {name: p for name, p in model.named_parameters() if not hasattr(p, "ds_tensor")}  # DeepSpeed's parts
    return {name: p for name, p in named.items() if not _is_sharded(p, members)}


def compare_values(ranks: SequenceGroup, named: dict[str, Tensor]) -> None:
    """Raise ValueError on every rank where the ranks hold other values of a parameter.

    It reads every parameter once and sends 8 bytes of each to every rank. Parameters on the meta device have no values.
    """
    if told := find_difference(ranks, named):
        raise ValueError(
            f"the ranks hold other models: {told}. Make the model from the same seed, or load the same weights, on "
            "every rank"
        )


def find_difference(ranks: SequenceGroup, named: dict[str, Tensor]) -> str:
    """Which tensors differ, and on which ranks, from those of the largest number of ranks; "" where none does."""
    if not named:
        return ""
    sums = torch.stack([_checksum(parameter) for parameter in named.values()]).cpu()
    rows = collectives.all_gather(sums, ranks.control, "control").wait()
    _, kinds, counts = rows.unique(dim=0, return_inverse=True, return_counts=True)
    usual = int(counts[kinds].argmax())  # the first rank of the largest number that are alike
    differs = rows != rows[usual]
    others = differs.any(1).nonzero().flatten().tolist()
    names = [name for name, differing in zip(named, differs.any(0).tolist(), strict=True) if differing]
    if not others:
        return ""
    return f"{some(names)} differ{'s' * (len(names) == 1)} on rank {some(map(str, others))} from rank {usual}'s"


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor; other tensors as they are."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def some(names: Iterable[str]) -> str:
    """Names for a message: all, or the first three of many."""
    names = list(names)
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype in which a parameter's gradient is kept: its own, unless its `grad_dtype` says otherwise."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def _refuse_sharded(named: dict[str, Any], ranks: SequenceGroup) -> None:
    members = set(dist.get_process_group_ranks(ranks.process_group))
    for name, parameter in named.items():
        if _is_sharded(parameter, members):
            raise ValueError(
                f"{name} is a DTensor over axes {parameter.device_mesh.mesh_dim_names} of ranks that share sequences "
                f"or are replicas: an axis over which a model is cut is named {' or '.join(MODEL_AXES)}"
            )


def _is_sharded(parameter: Any, members: set[int]) -> bool:
    """Whether a parameter is a DTensor over more than one of some ranks."""
    mesh = getattr(parameter, "device_mesh", None)
    return mesh is not None and len(members.intersection(mesh.mesh.flatten().tolist())) > 1


def _describe(name: str, parameter: Tensor) -> str:
    line = f"{name} {list(parameter.shape)} {parameter.dtype} on {parameter.device.type}"
    if gradient_dtype(parameter) != parameter.dtype:
        line += f", its gradient {gradient_dtype(parameter)}"
    if hasattr(parameter, "placements"):
        line += f" as {parameter.placements}"
    return line if parameter.requires_grad else f"{line}, frozen"


def _tell_first_difference(ranks: SequenceGroup, lines: list[str]) -> None:
    """Raise ValueError with what each rank has in the first place where they differ."""
    count = torch.tensor([len(lines)], device="cpu")
    most = int(collectives.all_gather(count, ranks.control, "control").wait().max())
    hashes = [hashlib.sha256(line.encode()).digest()[:8] for line in lines] + [bytes(8)] * (most - len(lines))
    own = torch.tensor([int.from_bytes(value, "big", signed=True) for value in hashes], device="cpu")
    rows = collectives.all_gather(own, ranks.control, "control").wait()
    first = int((rows != rows[0]).any(0).nonzero()[0])
    own_line = lines[first] if first < len(lines) else "none"
    ranks.agree("comparing parameters", {f"parameter {first}": own_line}).wait()


@torch.no_grad()
def _checksum(parameter: Tensor) -> Tensor:
    """The sum of a parameter's bits, as int64: whatever order it is taken in, the same."""
    values = local_part(parameter)
    if values.is_meta:
        return torch.zeros((), dtype=torch.int64, device="cpu")
    values = torch.view_as_real(values) if values.is_complex() else values
    return values.view(_INTEGERS[values.element_size()]).sum(dtype=torch.int64)
