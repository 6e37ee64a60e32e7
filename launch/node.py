"""What one machine has: software, devices, disk, ports, as plain values that travel as JSON."""

import os
import platform
import shutil
import socket
import tempfile
import time
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import torch

from lasp.launch.ranks import cores

_MIB = 1 << 20
SIZE = 32 * _MIB
"""Bytes that are written to measure a disk."""

PORT = 29500
"""Torch's own, where ranks meet unless something else is said."""


def describe(folder: Path) -> dict[str, Any]:
    """This machine, as seen from this process. folder: where checkpoints would go. OSError where that is no folder."""
    try:
        speed, unwritable = write_speed(folder), ""
    except OSError as error:
        speed, unwritable = 0.0, str(error.strerror)
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "nccl": nccl(),
        "triton": installed("triton"),
        "devices": devices(),
        "cores": cores(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "folder": str(folder.resolve()),
        "disk": speed,
        "unwritable": unwritable,
        "free": shutil.disk_usage(folder).free,
        "port": can_listen(PORT),
        "range": port_range(),
    }


def devices() -> list[str]:
    """The GPUs that torch finds."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{device.name}, {device.total_memory / (1 << 30):.0f} GiB" for device in found]


def nccl() -> str:
    """The NCCL that torch runs, and the package that it comes from."""
    if not torch.cuda.is_available():
        return "none"
    running = ".".join(str(part) for part in torch.cuda.nccl.version())
    names = sorted({str(found.metadata["Name"]) for found in distributions()})
    packages = [f"{name} {version(name)}" for name in names if name.startswith("nvidia-nccl")]
    return f"{running} ({', '.join(packages) or 'in torch itself'})"


def installed(package: str) -> str:
    """A package's version, or "none"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def write_speed(folder: Path) -> float:
    """Bytes per second that a file in a folder takes, until they are on the disk."""
    block = os.urandom(_MIB)  # what compresses would be faster than a checkpoint
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        started = time.perf_counter()
        for _ in range(SIZE // _MIB):
            file.write(block)
        os.fsync(file.fileno())
        return SIZE / (time.perf_counter() - started)


def can_listen(port: int) -> bool:
    """Whether nobody holds a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def port_range() -> list[int] | None:
    """The first and last port that the system hands out, where it tells: gloo and NCCL listen there."""
    try:
        first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    except (OSError, ValueError):
        return None
    return [int(first), int(last)]
