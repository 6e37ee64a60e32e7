"""The CPU's cache as Linux tells it, and the blocks of chunks that fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lasp.kernels.portable import tiles
from lasp.kernels.portable.cache import UNTOLD, cache_bytes
from lasp.kernels.portable.tiles import Geometry


def write(folder: Path, **files: str) -> None:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n", encoding="ascii")


def test_the_largest_cache_that_holds_data_counts(tmp_path: Path) -> None:
    write(tmp_path / "index0", type="Data", size="32K")
    write(tmp_path / "index1", type="Instruction", size="99999K")
    write(tmp_path / "index2", type="Unified", size="512K")
    write(tmp_path / "index3", type="Unified", size="16384K")
    assert cache_bytes(tmp_path) == 16 << 20


@pytest.mark.parametrize("files", [{}, {"type": "Unified"}, {"type": "Unified", "size": "?"}], ids=str)
def test_a_system_that_does_not_tell(files: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / "index3", **files)
    assert cache_bytes(tmp_path) == cache_bytes(tmp_path / "missing") == UNTOLD


def geometry(heads: int = 4, dim: int = 128) -> Geometry:
    runs, sizes = ((0, 8192),), {"size": 64, "batch": 1, "heads": heads, "key_dim": dim, "value_dim": dim}
    return Geometry(runs, **sizes, scale=1.0, dtype=torch.float32, masked=True, trained=True)


@pytest.mark.parametrize(
    ("megabytes", "chunks"),
    [(1, 4), (32, 14), (500, 32)],  # of 4 x 64 rows each: the fewest, what fits, the most
)
def test_blocks_fit_the_cache(megabytes: int, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "cache_bytes", lambda: megabytes << 20)
    assert geometry().table.blocks[0].chunks == chunks
    assert geometry(heads=64, dim=256).table.blocks[0].chunks == 1 + (megabytes > 100)
