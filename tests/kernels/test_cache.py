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


def test_the_second_level_counts(tmp_path: Path) -> None:
    for i, (level, size) in enumerate([("1", "32K"), ("1", "32K"), ("2", "512K"), ("3", "16384K")]):
        write(tmp_path / f"index{i}", level=level, size=size)
    assert cache_bytes(tmp_path) == 512 << 10


@pytest.mark.parametrize("files", [{}, {"level": "2"}, {"level": "2", "size": "?"}], ids=str)
def test_a_system_that_does_not_tell(files: dict[str, str], tmp_path: Path) -> None:
    write(tmp_path / "index3", **files)
    assert cache_bytes(tmp_path) == cache_bytes(tmp_path / "missing") == UNTOLD


def geometry(heads: int = 4, dim: int = 128) -> Geometry:
    runs, sizes = ((0, 8192),), {"size": 64, "batch": 1, "heads": heads, "key_dim": dim, "value_dim": dim}
    return Geometry(runs, **sizes, scale=1.0, dtype=torch.float32, masked=True, trained=True)


@pytest.mark.parametrize(
    ("kilobytes", "threads", "chunks"),
    [(256, 2, 4), (512, 2, 4), (2048, 1, 8), (2048, 2, 16), (2048, 64, 32)],  # of 4 x 64 rows each
)
def test_blocks_fit_the_caches(kilobytes: int, threads: int, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "cache_bytes", lambda: kilobytes << 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert geometry().table.blocks[0].chunks == chunks
    assert geometry(heads=64, dim=256).table.blocks[0].chunks == (2 if threads == 64 else 1)
