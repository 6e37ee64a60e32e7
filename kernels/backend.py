"""Which implementation of a kernel runs, and why. The only file here that may look at the environment."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal, get_args

import torch
from torch import Tensor

from lasp.kernels.arguments import check_choice
from lasp.kernels.gpu import tuning
from lasp.kernels.portable.recurrence import PortableRecurrence
from lasp.kernels.recurrence import Recurrence
from lasp.kernels.softmax.cuda import CudaEfficient, CudaFlash, CudnnFlash, FlashPackage
from lasp.kernels.softmax.operators import CpuFlash, Operator, Plain

Backend = Literal["auto", "torch", "triton", "fla"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
CHUNK_SIZES = (16, 32, 64)
"""Those that Triton's kernels have tiles for."""
MOST_ERASING_CHANNELS = 256
"""The delta rule's states need all channels of their keys in one tile, of Triton's kernels and of others'."""
FLA_CHUNK_SIZES = (64,)
"""What all of flash-linear-attention's operators take."""


def implementation(
    backend: str, q: Tensor, chunk_size: int | None = None, causal: bool = True, erases: bool = False
) -> type[Recurrence]:
    """What sets up a recurrence for inputs like q. erases: it is of the delta family.

    Raises ValueError for a backend that is unknown or cannot do it.
    """
    chosen = resolve(backend, q, chunk_size, MOST_ERASING_CHANNELS if erases else None)
    if chosen == "fla":
        if not causal:
            raise ValueError("backend='fla' takes no causal=False; 'torch' and 'triton' do")
        from lasp.kernels.fla import FlaRecurrence

        return FlaRecurrence
    if chosen == "triton":
        # Triton is slow to import, and not there on every machine.
        from lasp.kernels.gpu.recurrence import TritonRecurrence

        return TritonRecurrence
    return PortableRecurrence


def resolve(backend: str, q: Tensor, chunk_size: int | None = None, most_channels: int | None = None) -> str:
    """The backend that "auto" means for inputs like q: Triton on CUDA, PyTorch elsewhere.

    most_channels: of keys, that kernels on a GPU take. Raises ValueError for a backend that is unknown or cannot do it.
    """
    check_choice("backend", backend, BACKENDS)
    chosen = automatic(q.device, q.dtype)[0] if backend == "auto" else backend
    if chosen == "triton":
        check_kernels("triton", "triton", q, chunk_size, CHUNK_SIZES, most_channels)
    if chosen == "fla":
        check_kernels("fla", "flash-linear-attention", q, chunk_size, FLA_CHUNK_SIZES, most_channels)
    return chosen


def automatic(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that "auto" means for tensors of a dtype on a device, and why."""
    if device.type != "cuda":
        return "torch", f"Triton's kernels need a GPU, and tensors are on {device.type}"
    if not has_package("triton"):
        return "torch", "the package triton is not installed"
    if dtype == torch.float64:
        return "torch", "Triton's kernels take no float64"
    return "triton", "tensors are on a GPU, and the package triton is installed"


def check_kernels(
    backend: str, package: str, q: Tensor, chunk_size: int | None, chunk_sizes: tuple[int, ...], channels: int | None
) -> None:
    """Raise ValueError unless a backend of Triton kernels can run on inputs like q. channels: of keys, at most."""
    if not has_package(backend):
        raise ValueError(f"backend={backend!r} needs the package {package}, which is not installed")
    if q.dtype == torch.float64:
        raise ValueError(f"backend={backend!r} takes float32, bfloat16 and float16, got torch.float64")
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend={backend!r} needs tensors on a GPU, got {q.device} (or TRITON_INTERPRET=1)")
    if chunk_size not in (None, *chunk_sizes):
        sizes = " or ".join(map(str, chunk_sizes))
        raise ValueError(f"backend={backend!r} takes a chunk_size of {sizes}, got {chunk_size}; 'torch' takes any")
    if channels is not None and q.shape[3] > channels:
        raise ValueError(
            f"backend={backend!r} takes at most {channels} channels of keys in the delta rule, got {q.shape[3]}; "
            "'torch' takes any"
        )


def has_package(name: str) -> bool:
    """Whether a package is installed, found without importing it."""
    return importlib.util.find_spec(name) is not None


def softmax_operator(k: Tensor, v: Tensor, masked: bool, softcap: float | None) -> Operator:
    """The attention of a tile with keys k [B, N, Hk, K] and values v [B, N, Hk, V]; masked: it has an explicit mask."""
    if softcap is None and k.device.type == "cpu":
        return CpuFlash()
    dims, half = (k.shape[3], v.shape[3]), k.dtype in (torch.float16, torch.bfloat16)
    if not k.is_cuda or masked or any(dim % 8 or dim > 256 for dim in dims):
        return Plain(softcap)
    one_dim = half and dims[0] == dims[1]
    if one_dim and has_package("flash_attn"):
        return FlashPackage(softcap)
    if softcap is not None or k.dtype == torch.float64:
        return Plain(softcap)
    if one_dim and dims[0] <= 128 and torch.cuda.get_device_capability(k.device) >= (9, 0):
        return CudnnFlash()
    return CudaFlash() if one_dim else CudaEfficient()


# The report ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BackendReport:
    """What runs on a device: decay, delta, softmax hold the implementation of each family and why it is chosen."""

    device: str
    versions: str
    decay: str
    delta: str
    softmax: str
    tilings: str

    def __str__(self) -> str:
        return "\n".join(f"{name:9} {value}" for name, value in vars(self).items())


def backend_report(device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16) -> BackendReport:
    """Which implementation "auto" means for each family, for tensors of a dtype on a device, and why.

    decay: `linear_attention`; delta: `delta_rule`; softmax: `softmax_attention`. tilings: where those of Triton's
    kernels come from. device: by default the GPU, or the CPU where there is none.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backend, reason = automatic(device, dtype)
    on_gpu = device.type == "cuda"
    tile = torch.empty(1, 1, 1, 64, device=device, dtype=dtype)
    operator = type(softmax_operator(tile, tile, masked=False, softcap=None))
    return BackendReport(
        device=f"{device.type} ({torch.cuda.get_device_name(device)})" if on_gpu else device.type,
        versions=f"torch {torch.__version__}, triton {version('triton') if has_package('triton') else 'not installed'}",
        decay=f"{backend}: {reason}",
        delta=f"{backend}: {reason}",
        softmax=f"{operator.__name__}: {(operator.__doc__ or '').splitlines()[0]}",
        tilings=tuning.origin() if backend == "triton" else "none: Triton's kernels do not run",
    )
