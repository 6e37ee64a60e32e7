"""How the Triton kernels are cut into tiles: defaults, and what `lasp tune` measured on this card."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch


@dataclass(frozen=True)
class Tiling:
    """key, value: channels of keys and of values to a tile; warps to a program; stages of a loop in flight."""

    key: int
    value: int
    warps: int
    stages: int


def tiling(kernel: str, key_dim: int, value_dim: int, gates: int, whole_keys: bool) -> Tiling:
    """The measured tiling of a kernel, or the default one. whole_keys: all channels of the keys in one tile."""
    found = measured().get(tuning_key(kernel, key_dim, value_dim, gates, whole_keys))
    return default_tiling(kernel, key_dim, value_dim, gates, whole_keys) if found is None else found


def default_tiling(kernel: str, key_dim: int, value_dim: int, gates: int, whole_keys: bool) -> Tiling:
    """What keeps everything in registers at 64 and 128 channels (`lasp bench kernels --compile-only`)."""
    per_channel, gradient = gates == 2, kernel == "grad_keys"
    if whole_keys:
        return Tiling(_power(key_dim, 256), _power(value_dim, 32), warps=8, stages=2)
    key = _power(key_dim, 32 if per_channel and gradient else 64)
    return Tiling(key, _power(value_dim, 64), warps=8 if per_channel or gradient else 4, stages=2)


def _power(size: int, most: int) -> int:
    """The smallest power of two that holds a size, from 16, the least that a product takes, to `most`."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


# What was measured --------------------------------------------------------------------------------------------------


def tuning_key(kernel: str, key_dim: int, value_dim: int, gates: int, whole_keys: bool) -> str:
    return f"{kernel} K={key_dim} V={value_dim} gates={gates}{' delta' if whole_keys else ''}"


def cache_file() -> Path:
    """One per kind of card and version of Triton, under $LASP_CACHE or ~/.cache/lasp."""
    import triton

    folder = Path(os.environ.get("LASP_CACHE", Path.home() / ".cache" / "lasp"))
    card = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    return folder / f"tilings-{card}-triton-{triton.__version__}.json"


@cache
def measured() -> dict[str, Tiling]:
    """What `lasp tune` has written, read once."""
    file = cache_file()
    if not file.exists():
        return {}
    return {name: Tiling(**values) for name, values in json.loads(file.read_text(encoding="utf-8")).items()}


def save(tilings: dict[str, Tiling]) -> Path:
    """Add to what was measured, and return the file."""
    file = cache_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    values = {name: asdict(one) for name, one in (measured() | tilings).items()}
    file.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    measured.cache_clear()
    return file
