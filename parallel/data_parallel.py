"""Backward that reduces gradients by itself: DDP and FSDP2, told to sum over sp and to average over replicas."""

import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lasp.kernels.arguments import check_choice
from lasp.parallel import collectives
from lasp.parallel.group import SequenceGroup
from lasp.parallel.parameters import (
    Parameters,
    Reduced,
    agree_on_parameters,
    compare_values,
    parameters_of,
    replicas_of,
    some,
)

Kind = Literal["ddp", "fsdp2"]

# Buffers are made alike on every rank: no need to send them with each forward. torch 2.13 renames the option.
_DDP = inspect.signature(nn.parallel.DistributedDataParallel).parameters
_KEEP_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _DDP else "broadcast_buffers": False
}


def data_parallel(
    model: nn.Module,
    group: SequenceGroup,
    kind: Kind = "ddp",
    *,
    reduce_dtype: torch.dtype | None = None,
    reshard: bool = True,
    offload: bool = False,
) -> nn.Module:
    """Make backward itself sum gradients over sp and average them over dp; call the module that comes back.

    kind: "ddp" wraps the model in DistributedDataParallel, which sends rank 0's parameters and buffers to every rank
    (its `own_norms` are those of this rank's own gradients of the last backward, before the sum, by parameter);
    "fsdp2" shards its parameters in place over the mesh's dp x sp ranks, one unit per entry of its outermost module
    lists (the layers) and one for the rest; tensor parallelism over the mesh's "tp" may come before. In both, a rank
    whose tokens miss a parameter that others use (an expert) is a case for `sync_gradients`; fsdp2 takes it from torch
    2.13 on. reduce_dtype: in which gradients travel and are summed; None leaves them as they are.
    Of fsdp2, reshard=False keeps what a forward has gathered until backward has used it, and offload=True keeps
    parameters, gradients and what an optimizer makes of them in the CPU's memory between their uses.

    Raises ValueError on every rank for another kind, for models that differ between ranks (under fsdp2 by value too:
    every parameter is read once), for a model whose backward reduces already, and for what a kind cannot take: sparse
    embeddings, DTensors under ddp, trained parameters of two dtypes in one unit of fsdp2.
    """
    ranks = replicas_of(group)
    told = {"kind": kind, "dtype": str(reduce_dtype), "reshard": reshard, "offload": offload}

    def find() -> Parameters:
        if kind == "ddp" and (offload or not reshard):
            raise ValueError(f"reshard and offload are of 'fsdp2', got reshard={reshard} and offload={offload}")
        return Parameters(_reducible(model, ranks, kind), told)

    named = agree_on_parameters(ranks, "data_parallel", find)
    if kind == "ddp":
        return _replicate(model, ranks, ranks.size // group.size, reduce_dtype)
    compare_values(ranks, named)
    return _fully_shard(model, ranks, ranks.size // group.size, _policies(reduce_dtype, reshard, offload))


def _reducible(model: nn.Module, ranks: SequenceGroup, kind: str) -> dict[str, Tensor]:
    check_choice("kind", kind, get_args(Kind))
    named = parameters_of(model, ranks)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ValueError(f"no parameter of {type(model).__name__} is trained")
    sparse = [name for name, module in model.named_modules() if getattr(module, "sparse", None) is True]
    if sparse:
        raise ValueError(f"{some(sparse)}: gradients are reduced dense, make the embedding with sparse=False")
    if kind == "ddp":
        placed = [name for name, parameter in named.items() if hasattr(parameter, "placements")]
        if placed:
            raise ValueError(f"ddp takes no DTensors ({some(placed)}): use 'fsdp2', or sync_gradients in a plain loop")
        return named
    others = _of_another_dtype(model, named)
    if others:
        raise ValueError(
            f"fsdp2 shards trained parameters of one dtype together; of another than most: {some(others)}. Make the "
            "model float32 and train it under torch.autocast, or use 'ddp'"
        )
    return named


def _of_another_dtype(model: nn.Module, named: dict[str, Tensor]) -> list[str]:
    """The trained parameters whose dtype is not that of most in their unit of FSDP2, each with its dtype."""
    seen: set[Tensor] = set()
    found = []
    for module in [*outermost_layers(model), model]:
        unit = {
            name: p for name, p in named.items() if p.requires_grad and p not in seen and p in set(module.parameters())
        }
        seen.update(unit.values())
        most = Counter(parameter.dtype for parameter in unit.values()).most_common(1)
        found += [f"{name} ({p.dtype})" for name, p in unit.items() if p.dtype != most[0][0]]
    return found


def _replicate(model: nn.Module, ranks: SequenceGroup, replicas: int, dtype: torch.dtype | None) -> nn.Module:
    wrapped = nn.parallel.DistributedDataParallel(model, process_group=ranks.process_group, **_KEEP_BUFFERS)
    norms: dict[Tensor, Tensor] = {}
    wrapped.own_norms = norms  # type: ignore[assignment]

    def sum_then_average(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        # DDP's own reduction divides by dp x sp: the sum over sp would be off by a factor that is not always exact.
        precise = torch.promote_types(bucket.buffer().dtype, torch.float32)
        own = torch._foreach_norm(bucket.gradients(), 2.0, dtype=precise)
        norms.update(zip(bucket.parameters(), own, strict=True))
        sent = bucket.buffer() if dtype is None else bucket.buffer().to(dtype)
        summed = collectives.all_reduce_future(sent, ranks.process_group, "gradients", replicas)
        return summed if dtype is None else summed.then(lambda done: bucket.buffer().copy_(done.value()))

    wrapped.register_comm_hook(None, sum_then_average)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(Reduced(wrapped))
    return wrapped


def _policies(reduce_dtype: torch.dtype | None, reshard: bool, offload: bool) -> dict[str, Any]:
    """Options of `fully_shard`."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy  # takes a second to import

    return {
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=reduce_dtype),
        "reshard_after_forward": None if reshard else False,  # None: what lies outside the layers stays gathered
        "offload_policy": CPUOffloadPolicy(torch.cuda.is_available()) if offload else OffloadPolicy(),
    }


def _fully_shard(model: nn.Module, ranks: SequenceGroup, replicas: int, options: dict[str, Any]) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    from lasp.parallel.counted import CountedGather, CountedScatter

    device = next(model.parameters()).device.type
    # A part of the whole mesh where there is one: parameters that tensor parallelism sharded lie on another part.
    mesh = ranks.mesh or DeviceMesh.from_group(ranks.process_group, device)
    for module in [*outermost_layers(model), model]:
        unit = fully_shard(module, mesh=mesh, **options)
        unit.set_gradient_divide_factor(replicas)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no average, and no product before a sum
        unit.set_custom_all_gather(CountedGather())
        unit.set_custom_reduce_scatter(CountedScatter())
        if hasattr(unit, "set_reduce_scatter_unused_params"):
            unit.set_reduce_scatter_unused_params(True, recurse=False)
    return model


def outermost_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The entries of module lists that are in no other list: layers, but not the experts inside them."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else outermost_layers(child)
