"""Which implementation of a kernel family runs. The only file here that may look at the environment."""

from __future__ import annotations

import torch
from torch import Tensor

from lasp.kernels.decay.chunked import DecayStages
from lasp.kernels.delta.chunked import DeltaStages
from lasp.kernels.softmax.operators import CpuFlash, CudaFlash, Operator, Plain

BACKENDS = ("auto", "torch")


def decay_stages(backend: str) -> DecayStages:
    """The stages of the decay family."""
    _check_backend(backend)
    return DecayStages()


def delta_stages(backend: str) -> DeltaStages:
    """The stages of the delta family."""
    _check_backend(backend)
    return DeltaStages()


def softmax_operator(k: Tensor, v: Tensor, masked: bool, softcap: float | None) -> Operator:
    """The attention of a tile with keys k [B, N, Hk, K] and values v [B, N, Hk, V]; masked: it has an explicit mask."""
    if softcap is None and k.device.type == "cpu":
        return CpuFlash()
    half = k.dtype in (torch.float16, torch.bfloat16)
    if softcap is None and k.is_cuda and half and not masked and k.shape[3] == v.shape[3] <= 256:
        return CudaFlash()
    return Plain(softcap)


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
