"""Parameter gradients: summed over the ranks of a sequence, averaged over data-parallel replicas; and their norm."""

import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lasp.parallel import collectives
from lasp.parallel.group import SequenceGroup

# Buffers are made alike on every rank: no need to send them with each forward. torch 2.13 renames the option.
_DDP = inspect.signature(nn.parallel.DistributedDataParallel).parameters
_KEEP_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP else "broadcast_buffers": False
}


def sync_gradients(model: nn.Module, group: SequenceGroup) -> None:
    """After `loss.backward()` of a plain loop: sum every gradient over sp and average it over dp, in place.

    A gradient that is None on some ranks counts as zero there (a rank whose tokens reached no expert); one that is
    None on all of them stays None. One all-reduce per dtype, over the mesh's dp x sp ranks.
    """
    process_group, replicas = _gradient_group(group)
    if dist.get_world_size(process_group) == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        return
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    present = collectives.all_reduce(present, process_group, "control").wait()
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for parameter, ranks in zip(parameters, present.tolist(), strict=True):
        if ranks:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_dtype[parameter.grad.dtype].append(parameter.grad)
    for grads in by_dtype.values():
        flat = torch.cat([grad.flatten() for grad in grads])
        flat = collectives.all_reduce(flat, process_group, "gradients").wait() / replicas
        for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(total.view_as(grad))


def data_parallel(model: nn.Module, group: SequenceGroup, kind: str = "ddp") -> nn.Module:
    """Make backward itself sum gradients over sp and average them over dp; call the module that comes back.

    kind: "ddp" wraps the model in DistributedDataParallel; "fsdp2" shards its parameters in place over the mesh's
    dp x sp ranks, one unit per entry of its outermost module lists (the layers) and one for the rest. In both, a rank
    whose tokens miss a parameter that others use (an expert) is a case for `sync_gradients`; fsdp2 takes it from torch
    2.13 on. Raises ValueError for another kind.
    """
    if kind == "ddp":
        return _replicate(model, group)
    if kind == "fsdp2":
        return _fully_shard(model, group)
    raise ValueError(f"kind must be 'ddp' or 'fsdp2', got {kind!r}")


def _replicate(model: nn.Module, group: SequenceGroup) -> nn.Module:
    process_group, replicas = _gradient_group(group)
    wrapped = nn.parallel.DistributedDataParallel(model, process_group=process_group, **_KEEP_BUFFERS)

    def sum_then_average(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        # DDP's own reduction divides by dp x sp: the sum over sp would be off by a factor that is not always exact.
        return collectives.all_reduce_future(bucket.buffer(), process_group, "gradients", replicas)

    wrapped.register_comm_hook(None, sum_then_average)
    return wrapped


def _fully_shard(model: nn.Module, group: SequenceGroup) -> nn.Module:
    from torch.distributed.fsdp import fully_shard  # takes a second to import

    process_group, replicas = _gradient_group(group)
    mesh = DeviceMesh.from_group(process_group, next(model.parameters()).device.type)
    for module in [*_outermost_layers(model), model]:
        unit = fully_shard(module, mesh=mesh)
        unit.set_gradient_divide_factor(replicas)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no average, and no product before a sum
        if hasattr(unit, "set_reduce_scatter_unused_params"):
            unit.set_reduce_scatter_unused_params(True, recurse=False)
    return model


def _outermost_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The entries of module lists that are in no other list: layers, but not the experts inside them."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _outermost_layers(child)


def clip_grad_norm_(model: nn.Module | Iterable[Tensor], max_norm: float, group: SequenceGroup | None = None) -> Tensor:
    """Scale the gradients so that the 2-norm of all of them together is at most `max_norm`; returns what it was.

    model: a module, or its parameters. It comes after `sync_gradients`, or after the backward of a `data_parallel`
    model; FSDP2's sharded gradients count whole. The norm is a scalar, the same on every rank. Raises ValueError on
    every rank where the ranks' norms differ: a rank's own part of a gradient has a norm of its own. A group without
    checks sends nothing and trusts.
    """
    parameters = list(model.parameters() if isinstance(model, nn.Module) else model)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a DTensor
    if group is not None and group.checks and parameters:
        sent = norm.detach().to(parameters[0].device, torch.float64)
        norms = collectives.all_gather(sent, _gradient_group(group)[0], "control").wait()
        if norms.max() - norms.min() > 1e-3 * norms.max():
            told = ", ".join(f"{value:.4g}" for value in norms.tolist())
            raise ValueError(f"the gradients of the ranks have norms {told}: lasp.sync_gradients comes before clipping")
        norm = norms.max().to(norm.dtype)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _gradient_group(group: SequenceGroup) -> tuple[dist.ProcessGroup, int]:
    """The ranks that hold replicas or shares of one gradient, and how many of them are data-parallel replicas.

    With a mesh it is a group of its own even for one replica: on the sequence's, the scans of earlier layers would
    queue behind buckets of gradients.
    """
    mesh, axis = group.mesh, group.axis
    if mesh is None or axis is None or "dp" not in (mesh.mesh_dim_names or ()):
        return group.process_group, 1
    return mesh["dp", axis]._flatten(f"dp_{axis}").get_group(), mesh["dp"].size()
