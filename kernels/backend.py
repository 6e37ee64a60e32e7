"""Which implementation of a kernel family runs. The only file here that may look at the environment."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lasp.kernels.decay.recurrence import DecayRecurrence
from lasp.kernels.delta.recurrence import DeltaRecurrence
from lasp.kernels.softmax.operators import CpuFlash, CudaFlash, Operator, Plain

if TYPE_CHECKING:  # triton is slow to import, and not there on every machine
    from lasp.kernels.decay.triton_recurrence import TritonDecay
    from lasp.kernels.delta.triton_recurrence import TritonDelta

BACKENDS = ("auto", "torch", "triton")


def decay_family(backend: str, q: Tensor) -> type[DecayRecurrence] | type[TritonDecay]:
    """What sets up a call of the decay family for inputs like q."""
    if resolve(backend, q) == "torch":
        return DecayRecurrence
    from lasp.kernels.decay.triton_recurrence import TritonDecay

    return TritonDecay


def delta_family(backend: str, q: Tensor) -> type[DeltaRecurrence] | type[TritonDelta]:
    """What sets up a call of the delta family for inputs like q."""
    if resolve(backend, q) == "torch":
        return DeltaRecurrence
    from lasp.kernels.delta.triton_recurrence import TritonDelta

    return TritonDelta


def resolve(backend: str, q: Tensor) -> str:
    """The backend that "auto" means for inputs like q: Triton on CUDA, PyTorch elsewhere and for fp64.

    Raises ValueError for one that is unknown or cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return "triton" if q.is_cuda and q.dtype != torch.float64 and _has_triton() else "torch"
    if backend == "triton":
        _check_triton(q)
    return backend


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _check_triton(q: Tensor) -> None:
    if not _has_triton():
        raise ValueError("backend='triton' needs the package triton, which is not installed")
    if q.dtype == torch.float64:
        raise ValueError("backend='triton' takes float32, bfloat16 and float16, got torch.float64")
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend='triton' needs tensors on a GPU, got {q.device} (or TRITON_INTERPRET=1)")


def softmax_operator(k: Tensor, v: Tensor, masked: bool, softcap: float | None) -> Operator:
    """The attention of a tile with keys k [B, N, Hk, K] and values v [B, N, Hk, V]; masked: it has an explicit mask."""
    if softcap is None and k.device.type == "cpu":
        return CpuFlash()
    half = k.dtype in (torch.float16, torch.bfloat16)
    if softcap is None and k.is_cuda and half and not masked and k.shape[3] == v.shape[3] <= 256:
        return CudaFlash()
    return Plain(softcap)
