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


@dataclass(frozen=True)
class Work:
    """What a tiling is for.

    gates: 0 none, 1 per head, 2 per channel; whole_keys: all channels of the keys in one tile (a delta rule's chain);
    wide: values are longer than keys (what a delta rule's tokens write); short: bf16 is multiplied, else fp32 in three
    products of tf32.
    """

    kernel: str
    key_dim: int
    value_dim: int
    gates: int
    whole_keys: bool
    wide: bool
    short: bool

    def __str__(self) -> str:
        numbers = f"{self.kernel} K={self.key_dim} V={self.value_dim} gates={self.gates}"
        return " ".join([numbers, *(name for name in ("whole_keys", "wide", "short") if getattr(self, name))])


SMALL = (86, 89, 120, 121)
"""Cards with 99 KiB of shared memory to a block, where data centers' have 163 or 227."""

in_use: dict[Work, Tiling] = {}
"""The tilings of the kernels that have run. `lasp tune` puts in what it tries."""


def tiling(work: Work) -> Tiling:
    """The measured tiling of a kernel, or the default one."""
    if work not in in_use:
        in_use[work] = measured().get(str(work)) or default_tiling(work)
    return in_use[work]


def default_tiling(work: Work) -> Tiling:
    """What keeps everything in registers at 64 and 128 channels in bf16 (`lasp bench kernels --compile-only`).

    A gradient of keys is many tiles at once, and decays per channel are tiles of their own: less of each, or 8 warps.
    Cards before sm_90 multiply out of registers, later ones out of shared memory.
    """
    key, value, warps, stages = _default(work, architecture())
    # Tiles of fp32 operands take twice the shared memory, which leaves no room for a second stage.
    return Tiling(_power(work.key_dim, key), _power(work.value_dim, value), warps, stages if work.short else 1)


def _default(work: Work, card: int) -> tuple[int, int, int, int]:
    """Most channels of keys and of values to a tile, warps and stages."""
    per_channel, hopper = work.gates == 2, card >= 90
    if work.whole_keys:  # the state's channels of one program, all of them
        crowded = card in SMALL or (per_channel and work.key_dim > 128)
        return 256, 16 if per_channel and work.key_dim > 64 else 32, 8, 1 if crowded else 2
    if work.kernel == "grad_keys":
        most = 32 if per_channel else 64
        return most if hopper else most // 2, most, 8, 2
    if work.kernel == "grad_solve":
        return 64, 32, 4, 2
    # Without decays 4 warps make the assembler save registers and spill.
    warps = 4 if work.gates == 1 and work.kernel != "solve" else 8
    # A loop over chunks looks up where each lies before it loads it: a stage for either.
    return 64, 64, warps, 3 if work.kernel in ("carry", "carry_back") else 2


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


def cache_file() -> Path:
    """One per kind of card and version of Triton, in ~/.cache/lasp."""
    card = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    folder = Path(os.path.expanduser("~/.cache/lasp"))  # not Path.home(), which fails where there is none
    return folder / f"tilings-{card}-triton-{version('triton')}.json"


@cache
def measured() -> dict[str, Tiling]:
    """What `lasp tune` has written, by the `Work` it is for, read once. ValueError for a file that is none."""
    file = cache_file()
    if not file.exists():
        return {}
    try:
        return {name: Tiling(**values) for name, values in json.loads(file.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} is no file of `lasp tune`, which writes it anew once it is gone") from error


def origin() -> str:
    """Where the tilings come from, in words."""
    file = cache_file()
    if not measured():
        return f"the defaults: `lasp tune` has not written {file}"
    return f"{len(measured())} that `lasp tune` measured, in {file}, and the defaults"


def save(tilings: dict[Work, Tiling]) -> Path:
    """Add to what was measured, and return the file."""
    file = cache_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    known = measured() | {str(work): one for work, one in tilings.items()}
    values = {name: asdict(one) for name, one in known.items()}
    file.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    measured.cache_clear()
    in_use.clear()
    return file
