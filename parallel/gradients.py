"""Parameter gradients: summed over the ranks of a sequence, averaged over data-parallel replicas; and their norm."""

from __future__ import annotations

import numbers
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lasp.parallel import collectives
from lasp.parallel.group import SequenceGroup
from lasp.parallel.parameters import (
    Parameters,
    agree_on_parameters,
    compare_values,
    gradient_dtype,
    hooks_of,
    local_part,
    parameters_of,
    replicas_of,
    some,
)


def sync_gradients(model: nn.Module, group: SequenceGroup) -> None:
    """Once per optimizer step of a plain loop: sum every gradient over sp and average it over dp, in place.

    It comes after the last `loss.backward()` of an accumulation. Replicas are the ranks along every axis of the group's
    mesh but "tp" and "pp"; DTensors sharded over those are summed by their local parts. A gradient that is None on some
    ranks counts as zero there (a rank whose tokens reached no expert); one that is None on all of them stays None. One
    all-reduce per dtype.

    The first call for a model compares the parameters' values: it reads them once, and sends 8 bytes of each to every
    rank. Warns of the ranks whose gradients are nan or inf. Raises ValueError on every rank where the ranks' models
    differ, where a gradient holds such a sum already, where the model's own backward reduces them (`data_parallel`),
    and for sparse gradients.
    """
    ranks = replicas_of(group)
    named = agree_on_parameters(ranks, "sync_gradients", lambda: Parameters(_to_be_summed(model, ranks), {}))
    if ranks.size == 1:
        return
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    unknown = [parameter for parameter in trained.values() if not hooks_of(parameter, _Watch)]
    asked = [bool(unknown), *(parameter.grad is not None for parameter in trained.values())]
    told = torch.tensor(asked, dtype=torch.int32, device="cpu")
    counts = collectives.all_reduce(told, ranks.control, "control").wait().tolist()
    if counts[0] and ranks.checks:
        compare_values(ranks, named)
    for parameter in unknown:
        parameter.register_hook(_Watch(parameter))
    by_dtype: dict[torch.dtype, dict[str, Tensor]] = defaultdict(dict)
    for (name, parameter), holders in zip(trained.items(), counts[1:], strict=True):
        if holders:
            by_dtype[gradient_dtype(parameter)][name] = _dense_gradient(parameter)
    for gradients in by_dtype.values():
        _sum(gradients, ranks, ranks.size // group.size)


def _sum(gradients: dict[str, Tensor], ranks: SequenceGroup, replicas: int) -> None:
    """Sum gradients of one dtype over the ranks, divide by the number of replicas, and mark them as summed."""
    with torch.no_grad():
        parts = [local_part(gradient) for gradient in gradients.values()]
    flat = torch.cat([part.flatten() for part in parts])
    flat = collectives.all_reduce(flat, ranks.process_group, "gradients").wait() / replicas
    if not flat.isfinite().all():  # on every rank alike: they all hold this sum
        _warn_of_unfinite(dict(zip(gradients, parts, strict=True)), ranks)
    totals = flat.split([part.numel() for part in parts])
    for gradient, part, total in zip(gradients.values(), parts, totals, strict=True):
        part.copy_(total.view_as(part))
        gradient._lasp_summed = True  # type: ignore[attr-defined]


def _warn_of_unfinite(parts: dict[str, Tensor], ranks: SequenceGroup) -> None:
    """Warn, on every rank, of the ranks that have gradients with nan or inf, and of each one's first."""
    names = list(parts)
    first = next((i for i, part in enumerate(parts.values()) if not part.isfinite().all()), len(names))
    own = torch.tensor([first], device="cpu")
    found = collectives.all_gather(own, ranks.control, "control").wait().flatten().tolist()
    told = [f"rank {rank} (first {names[i]})" for rank, i in enumerate(found) if i < len(names)]
    whose = f"of {some(told)} are" if told else "of every rank are finite, and their sum is"
    warnings.warn(f"the gradients {whose} nan or inf; after the sum they are so on every rank", RuntimeWarning, 4)


def clip_grad_norm_(model: nn.Module | Iterable[Tensor], max_norm: float, group: SequenceGroup | None = None) -> Tensor:
    """Scale the gradients so that the 2-norm of all of them together is at most `max_norm`; returns what it was.

    model: a module, or its parameters. It comes after `sync_gradients`, or after the backward of a `data_parallel`
    model; DTensors (FSDP2, tensor parallelism) count whole. The norm is a scalar of fp32, or fp64 where a gradient is,
    the same on every rank; where it is not finite, the gradients stay as they are. Raises ValueError, with a group on
    every rank of it, where there is no parameter or a sparse gradient, and where the ranks' parameters, `max_norm` or
    norms differ: a rank's own part of a gradient has a norm of its own. A group without checks sends nothing and
    trusts.
    """
    ranks = None if group is None else replicas_of(group)
    named = agree_on_parameters(ranks, "clip_grad_norm_", lambda: _to_be_clipped(model, max_norm))
    by_mesh: dict[Any, list[Tensor]] = defaultdict(list)  # operations on many tensors take those of one mesh at a time
    for parameter in named.values():
        if parameter.grad is not None:
            by_mesh[getattr(parameter.grad, "device_mesh", None)].append(parameter)
    device = next(iter(named.values())).device
    norms = [_norm([p.grad for p in parameters]).to(device) for parameters in by_mesh.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=device)
    if ranks is not None and ranks.checks:
        norm = _common_norm(norm, ranks)
    scaled_by = norm.where(norm.isfinite(), 0)
    for parameters in by_mesh.values():
        nn.utils.clip_grads_with_norm_(parameters, max_norm, scaled_by)
    return norm


@torch.no_grad()
def _norm(gradients: list[Any]) -> Tensor:
    """The 2-norm of gradients of one mesh. Half precision would overflow, and round to three digits."""
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_dtype[gradient.dtype].append(gradient)
    norms: list[Tensor] = []
    for dtype, own in by_dtype.items():
        norms += torch._foreach_norm(own, 2.0, dtype=torch.promote_types(dtype, torch.float32))
    norm = torch.linalg.vector_norm(torch.stack(norms))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _common_norm(norm: Tensor, ranks: SequenceGroup) -> Tensor:
    """The norm that all ranks have. Raises ValueError on every rank where they differ."""
    norms = collectives.all_gather(norm.detach().cpu().double(), ranks.control, "control").wait()
    if norms.isfinite().all():
        alike = norms.max() - norms.min() <= 1e-3 * norms.max()
    else:
        alike = norms.isnan().all() or norms.isposinf().all()
    if not alike:
        told = ", ".join(f"{value:.4g}" for value in norms.tolist())
        raise ValueError(f"the gradients of the ranks have norms {told}: lasp.sync_gradients comes before clipping")
    return norms.max().to(norm)


def _to_be_summed(model: nn.Module, ranks: SequenceGroup) -> dict[str, Tensor]:
    named = parameters_of(model, ranks)
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    devices = {str(parameter.device): None for parameter in trained.values()}
    if len(devices) > 1:
        raise ValueError(f"parameters lie on {some(devices)}: a rank's gradients are summed on one device")
    present = {name: parameter for name, parameter in trained.items() if parameter.grad is not None}
    _refuse("sparse gradients, and they are summed dense: make the embedding with sparse=False", present, _is_sparse)
    _refuse("gradients with a graph of their own (create_graph=True), which a sum would cut", present, _has_graph)
    _refuse("gradients of another shape, dtype or device than the parameter", present, _is_unlike)
    marked = [name for name, parameter in present.items() if hasattr(parameter.grad, "_lasp_summed")]
    if marked:
        holds = torch.stack([_still_summed(present[name].grad) for name in marked]).tolist()
        summed = [name for name, still in zip(marked, holds, strict=True) if still]
        if summed:
            raise ValueError(
                f"the gradients of {some(summed)} hold a sum over the ranks already: lasp.sync_gradients comes once "
                "per optimizer step, after the last backward of an accumulation, and zero_grad() before the next"
            )
    return named


def _to_be_clipped(model: nn.Module | Iterable[Tensor], max_norm: float) -> Parameters:
    """Parameters by their place: a module on one rank and its parameters on another are the same."""
    whole = model.parameters() if isinstance(model, nn.Module) else [model] if isinstance(model, Tensor) else model
    named = {f"parameter {place}": parameter for place, parameter in enumerate(whole)}
    if not named:
        raise ValueError("there is no parameter to clip (a generator is empty after its first use)")
    for parameter in named.values():
        if not isinstance(parameter, Tensor):
            raise ValueError(f"model must be a torch.nn.Module or its parameters, got {type(parameter).__name__}")
    _refuse("sparse gradients, which have no norm beside dense ones", named, _is_sparse)
    is_number = isinstance(max_norm, numbers.Real) or (isinstance(max_norm, Tensor) and max_norm.numel() == 1)
    if not is_number or not float(max_norm) >= 0:
        raise ValueError(f"max_norm must be a number of at least 0, got {max_norm!r}")
    return Parameters(named, {"max_norm": repr(float(max_norm))})


def _refuse(what: str, named: dict[str, Any], has: Callable[[Any], bool]) -> None:
    names = [name for name, parameter in named.items() if parameter.grad is not None and has(parameter)]
    if names:
        raise ValueError(f"{some(names)} {'has' if len(names) == 1 else 'have'} {what}")


def _is_sparse(parameter: Any) -> bool:
    return parameter.grad.layout is not torch.strided


def _has_graph(parameter: Any) -> bool:
    return parameter.grad.requires_grad


def _is_unlike(parameter: Any) -> bool:
    grad = parameter.grad
    is_other = hasattr(grad, "placements") != hasattr(parameter, "placements")
    expected = parameter.shape, gradient_dtype(parameter), parameter.device
    return is_other or (grad.shape, grad.dtype, grad.device) != expected


def _dense_gradient(parameter: Any) -> Tensor:
    """The gradient, zeros where there is none; that of a DTensor placed like it, so that all ranks' parts are alike."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=gradient_dtype(parameter))
    elif getattr(parameter, "placements", None) != getattr(parameter.grad, "placements", None):
        parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
    gradient: Tensor = parameter.grad
    return gradient


class _Watch:
    """A hook that looks, before a backward adds to a gradient that was summed, whether it was zeroed since.

    A gradient says that it was summed by an attribute of its own, which goes with it where zero_grad() drops it. Where
    it is zeroed in place the attribute stays. A parameter has one such hook from its first sum on: hooks, unlike
    attributes, are left behind when a parameter is copied or pickled.
    """

    __torch_unserializable__ = True

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = weakref.ref(parameter)

    def __call__(self, incoming: Tensor) -> None:
        gradient: Any = getattr(self.parameter(), "grad", None)
        if hasattr(gradient, "_lasp_summed"):
            gradient._lasp_summed = _still_summed(gradient)


@torch.no_grad()
def _still_summed(gradient: Any) -> Tensor:
    """Whether the sum is in a gradient yet, which all zeros tell not: a flag that waits for no device."""
    flag: Tensor = gradient._lasp_summed & local_part(gradient).any()
    return flag
