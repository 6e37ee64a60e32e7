"""What one process can tell of headers and groups; what ranks tell one another is in tests/distributed."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist

import lasp
from lasp.parallel import agreement, group


def row(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content.ljust(agreement.HEADER_BYTES, b"\0")), dtype=torch.uint8)


def test_a_header_is_read_as_it_was_written() -> None:
    header = {"call": ["linear_attention", 3], "of": {}, "tokens": 5, "error": None, "fields": {"scale": 0.5}}
    assert agreement._unpack(row(agreement._pack(header)), 1) == header


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(range(256)) * 4,
        torch.randn(256).numpy().tobytes(),
        json.dumps({"tokens": 3}).encode(),
        agreement.MAGIC,
        agreement.MAGIC + b'{"call": ["unsh',
        agreement.MAGIC + b"\xff\xfe\xfd",
        b"lasp header 0\n{}",
    ],
)
def test_what_is_no_header_is_one_line(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^what came from rank 3 in place of a header is none \(.*\)$"):
        agreement._unpack(row(content), 3)


@pytest.fixture
def alone() -> lasp.SequenceGroup:
    """A world of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield lasp.SequenceGroup.from_group()
    dist.destroy_process_group()


def test_a_group_is_itself_when_copied_and_cannot_be_saved(alone: lasp.SequenceGroup) -> None:
    assert copy.deepcopy({"group": alone})["group"] is alone
    assert copy.copy(alone) is alone
    for save in (pickle.dumps, lambda x: torch.save({"group": x}, io.BytesIO())):
        with pytest.raises(TypeError, match="a SequenceGroup lives in its process and cannot be saved"):
            save(alone)


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
@pytest.mark.parametrize(("count", "told"), [("4", True), ("1", False), ("2(x3)", False), ("", False)])
def test_a_world_of_one_among_many(monkeypatch: pytest.MonkeyPatch, name: str, count: str, told: bool) -> None:
    for other in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, count)
    monkeypatch.setattr(group.dist, "is_initialized", lambda: False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        group._init_process_group()
    dist.destroy_process_group()
    lines = [str(warning.message) for warning in caught if "world of its own" in str(warning.message)]
    assert len(lines) == told
    assert all(line.startswith(f"{name}=4, but RANK, WORLD_SIZE and MASTER_ADDR are not set") for line in lines)
