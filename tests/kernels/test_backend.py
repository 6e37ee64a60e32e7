"""Which implementation "auto" means, and what the report says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lasp
from lasp.kernels import backend
from lasp.kernels.gpu import tuning
from lasp.kernels.gpu.tuning import Tiling, Work

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, with nothing measured in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    tuning.measured.cache_clear()
    monkeypatch.setattr(tuning, "in_use", {})
    yield tmp_path
    tuning.measured.cache_clear()


def test_auto_is_triton_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "has_package", lambda name: True)
    assert backend.automatic(GPU, torch.bfloat16)[0] == "triton"
    assert backend.automatic(GPU, torch.float64) == ("torch", "Triton's kernels take no float64")
    assert backend.automatic(CPU, torch.bfloat16)[0] == "torch"
    monkeypatch.setattr(backend, "has_package", lambda name: False)
    assert backend.automatic(GPU, torch.bfloat16) == ("torch", "the package triton is not installed")


def test_the_report_says_what_runs_on_a_cpu_and_why() -> None:
    report = lasp.backend_report("cpu")
    assert report.decay == report.delta == "torch: Triton's kernels need a GPU, and tensors are on cpu"
    assert report.softmax.startswith("CpuFlash: ")
    assert report.tilings == "none: Triton's kernels do not run"
    assert f"torch {torch.__version__}" in report.versions
    assert str(report).splitlines()[:1] == ["device    cpu"]
    assert len(str(report).splitlines()) == 6


def test_tilings_come_from_what_was_measured_and_else_from_the_defaults(home: Path) -> None:
    work = Work("attend", 128, 128, 1, whole_keys=False, wide=False, short=True)
    default = tuning.default_tiling(work)
    assert tuning.tiling(work) == default
    assert tuning.origin() == f"the defaults: `lasp tune` has not written {tuning.cache_file()}"
    measured = Tiling(32, 32, warps=2, stages=4)
    file = tuning.save({work: measured})
    assert file.parent == home / ".cache" / "lasp"
    assert tuning.tiling(work) == measured != default
    for other in (replace(work, kernel="carry"), replace(work, short=False)):
        assert tuning.tiling(other) == tuning.default_tiling(other)
    assert tuning.origin() == f"1 that `lasp tune` measured, in {file}, and the defaults"
    tuning.save({replace(work, kernel="carry"): measured})
    assert len(tuning.measured()) == 2


@pytest.mark.parametrize("content", ["", "[]", '{"attend": 5}', '{"attend": {"rows": 32}}'])
def test_a_file_of_tilings_that_is_none_is_named(home: Path, content: str) -> None:
    tuning.cache_file().parent.mkdir(parents=True)
    tuning.cache_file().write_text(content)
    with pytest.raises(ValueError, match=r"tilings-.*\.json' is no file of `lasp tune`"):
        tuning.measured()


def test_fp32_operands_leave_no_room_for_a_second_stage() -> None:
    work = Work("attend", 128, 128, 1, whole_keys=False, wide=False, short=True)
    assert tuning.default_tiling(work).stages > tuning.default_tiling(replace(work, short=False)).stages == 1
