"""Choosing tilings, with times made up: no GPU is here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lasp.kernels.gpu import tuning
from lasp.kernels.gpu.tuning import Tiling, Work
from lasp.launch.cli import main
from lasp.launch.tune import MISFIT, climb, neighbours, tune_step

START = Tiling(64, 64, warps=4, stages=2)


def test_neighbours_differ_by_one_step() -> None:
    for one in neighbours(START, whole_keys=False):
        assert sum(a != b for a, b in zip(vars(one).values(), vars(START).values(), strict=True)) == 1
    assert len(set(neighbours(START, whole_keys=False))) == 6
    smallest = Tiling(16, 16, warps=8, stages=3)
    assert {(one.key, one.value) for one in neighbours(smallest, whole_keys=False)} == {(16, 16), (32, 16), (16, 32)}
    unstaged = Tiling(64, 64, warps=4, stages=1)
    assert {one.stages for one in neighbours(unstaged, whole_keys=False)} == {1, 2}


def test_a_tile_of_all_keys_keeps_them() -> None:
    assert {one.key for one in neighbours(Tiling(256, 32, warps=4, stages=2), whole_keys=True)} == {256}


def test_climbing_goes_on_until_nothing_is_better() -> None:
    """The best is three steps away: twice the keys, half the values, 8 warps."""
    tried = []

    def seconds(tiling: Tiling) -> float:
        tried.append(tiling)
        return 1.0 + abs(tiling.key - 128) / 64 + abs(tiling.value - 32) / 64 + (tiling.warps == 4) + tiling.stages

    assert climb(START, seconds, whole_keys=False) == Tiling(128, 32, warps=8, stages=2)
    assert len(tried) == len(set(tried))


def test_what_does_not_fit_or_is_hardly_faster_is_not_chosen() -> None:
    def seconds(tiling: Tiling) -> float:
        return MISFIT if tiling.warps == 8 else 0.99 if tiling.stages == 3 else 1.0

    assert climb(START, seconds, whole_keys=False) == START


def test_every_kernel_of_a_step_is_tuned_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "in_use", {})
    monkeypatch.setattr(tuning, "measured", dict)

    attend, carry = Work("attend", 128, 128, 1, False, False, True), Work("carry", 64, 64, 2, True, True, True)

    def step() -> None:
        tuning.tiling(attend)
        tuning.tiling(carry)
        tuning.tiling(replace(carry, short=False))  # stays with its default

    def timer(run: object) -> dict[str, float]:
        return {"attend": float(tuning.in_use[attend].key), "carry": 1.0 / tuning.in_use[carry].value}

    chosen = tune_step(step, timer)
    assert {work: (one.key, one.value) for work, one in chosen.items()} == {attend: (16, 64), carry: (64, 128)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_lasp_tune_refuses_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    assert capsys.readouterr().err == "lasp: error: lasp tune measures on a GPU, and torch sees none here\n"
