"""How the Triton kernels are cut into tiles: defaults, and what `lasp tune` measured on this card."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Tiling:
    """key, value: channels of keys and of values to a tile; warps to a program; stages of a loop in flight."""

    key: int
    value: int
    warps: int
    stages: int


SMALL = (86, 89, 120, 121)
"""Cards with 99 KiB of shared memory to a block, where data centers' have 163 or 227."""

in_use: dict[str, Tiling] = {}
"""The tilings of the kernels that have run, by `tuning_key`. `lasp tune` puts in what it tries."""


def tiling(kernel: str, key_dim: int, value_dim: int, gates: int, whole_keys: bool) -> Tiling:
    """The measured tiling of a kernel, or the default one. whole_keys: all channels of the keys in one tile."""
    key = tuning_key(kernel, key_dim, value_dim, gates, whole_keys)
    if key not in in_use:
        in_use[key] = measured().get(key) or default_tiling(kernel, key_dim, value_dim, gates, whole_keys)
    return in_use[key]


def default_tiling(kernel: str, key_dim: int, value_dim: int, gates: int, whole_keys: bool) -> Tiling:
    """What keeps everything in registers at 64 and 128 channels in bf16 (`lasp bench kernels --compile-only`).

    A gradient of keys is many tiles at once, and decays per channel are tiles of their own: less of each, or 8 warps.
    Cards before sm_90 multiply out of registers, later ones out of shared memory.
    """
    per_channel, hopper = gates == 2, architecture() >= 90
    if whole_keys:  # the state's channels of one program, all of them
        value = 16 if per_channel and key_dim > 64 else 32
        crowded = architecture() in SMALL or (per_channel and key_dim > 128)
        return Tiling(_power(key_dim, 256), _power(value_dim, value), warps=8, stages=1 if crowded else 2)
    if kernel == "grad_keys":
        key, value = (32, 32) if per_channel else (64, 64)
        return Tiling(_power(key_dim, key if hopper else key // 2), _power(value_dim, value), warps=8, stages=2)
    if kernel == "grad_solve":
        return Tiling(_power(key_dim, 64), _power(value_dim, 32), warps=4, stages=2)
    warps = 4 if gates == 1 and kernel != "solve" else 8  # without decays 4 make the assembler save registers and spill
    # A loop over chunks looks up where each lies before it loads it: a stage for either.
    stages = 3 if kernel in ("carry", "carry_back") else 2
    return Tiling(_power(key_dim, 64), _power(value_dim, 64), warps, stages)


def _power(size: int, most: int) -> int:
    """The smallest power of two that holds a size, from 16, the least that a product takes, to `most`."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


@cache
def architecture() -> int:
    """The compute capability of this machine's GPU, 90 for 9.0; also where there is none."""
    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


# What was measured --------------------------------------------------------------------------------------------------


def tuning_key(kernel: str, key_dim: int, value_dim: int, gates: int, whole_keys: bool) -> str:
    return f"{kernel} K={key_dim} V={value_dim} gates={gates}{' delta' if whole_keys else ''}"


def has_whole_keys(key: str) -> bool:
    """Whether a key of the above says so."""
    return key.endswith(" delta")


def cache_file() -> Path:
    """One per kind of card and version of Triton, in ~/.cache/lasp."""
    card = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    folder = Path(os.path.expanduser("~/.cache/lasp"))  # not Path.home(), which fails where there is none
    return folder / f"tilings-{card}-triton-{version('triton')}.json"


@cache
def measured() -> dict[str, Tiling]:
    """What `lasp tune` has written, read once."""
    file = cache_file()
    if not file.exists():
        return {}
    return {name: Tiling(**values) for name, values in json.loads(file.read_text(encoding="utf-8")).items()}


def origin() -> str:
    """Where the tilings come from, in words."""
    file = cache_file()
    if not measured():
        return f"the defaults: `lasp tune` has not written {file}"
    return f"{len(measured())} that `lasp tune` measured, in {file}, and the defaults"


def save(tilings: dict[str, Tiling]) -> Path:
    """Add to what was measured, and return the file."""
    file = cache_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    values = {name: asdict(one) for name, one in (measured() | tilings).items()}
    file.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    measured.cache_clear()
    in_use.clear()
    return file
