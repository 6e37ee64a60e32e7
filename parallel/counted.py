"""What FSDP2 exchanges by itself, written into the ledger like everything else."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from lasp.kernels.named import named
from lasp.parallel import collectives


class CountedGather(DefaultAllGather):
    """FSDP2's all-gather of parameters."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        collectives.record("all_gather", "parameters", output_tensor.nbytes - input_tensor.nbytes, 1)
        with _waiting(input_tensor), named("all_gather", "parameters"):
            return super().__call__(output_tensor, input_tensor, *args, **kwargs)


class CountedScatter(DefaultReduceScatter):
    """FSDP2's reduce-scatter of gradients."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        collectives.record("reduce_scatter", "gradients", input_tensor.nbytes - output_tensor.nbytes, 1)
        with _waiting(input_tensor), named("reduce_scatter", "gradients"):
            return super().__call__(output_tensor, input_tensor, *args, **kwargs)


def _waiting(tensor: Tensor) -> AbstractContextManager[None]:
    """On a CPU the call returns when all has come; on a GPU it only enqueues, on a stream of its own."""
    return collectives.aside() if tensor.is_cuda else collectives.waiting()
