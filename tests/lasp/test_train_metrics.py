"""The metrics file, the plot, what a run shows, the optimizer's schedule, and the checks of a configuration."""

import io
import math
import os
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from rich.console import Console

from lasp.train.config import DataConfig, OptimizerConfig, TrainConfig
from lasp.train.metrics import MetricsFile, StepMetrics, plot_loss, read_metrics
from lasp.train.optimizer import build_optimizers, learning_rate
from lasp.train.progress import TrainingProgress


def of_step(step: int) -> StepMetrics:
    return StepMetrics(step, loss=5.0 / step, lr=1e-3, grad_norm=0.5, tokens_per_second=1234.5)


def test_metrics_round_trip_and_resume_drops_what_will_be_done_again(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsFile(path) as file:
        for step in range(1, 6):
            file.write(of_step(step))
    with path.open("a") as cut_short:
        cut_short.write('{"step": 6, "lo')
    assert read_metrics(path) == [of_step(step) for step in range(1, 6)]
    with MetricsFile(path, steps_done=3) as file:
        file.write(replace(of_step(4), loss=7.0))
    assert [metrics.loss for metrics in read_metrics(path)] == [5.0, 2.5, 5.0 / 3, 7.0]
    with MetricsFile(path):
        assert read_metrics(path) == []


def test_plot_is_a_png(tmp_path):
    plot_loss([of_step(step) for step in range(1, 4)], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_step_loss_rate_and_time_left(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with TrainingProgress(2, 0, enabled=True, console=console) as progress:
        progress.update(of_step(1))
        progress.update(of_step(2))
    shown = console.file.getvalue()
    assert all(part in shown for part in ("step 2/2" if not terminal else "2/2", "loss 2.500", "tokens/s", "0:00 left"))
    assert ("\x1b" in shown) == terminal


def test_learning_rate_warms_up_and_falls_to_its_minimum():
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [learning_rate(step, 20, config) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(later < earlier for earlier, later in pairwise(rates[4:]))
    assert math.isclose(rates[-1], 0.1)
    assert learning_rate(0, 1, OptimizerConfig(warmup_steps=0)) == OptimizerConfig().lr


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    groups = build_optimizers(model, OptimizerConfig(weight_decay=0.1))[0].param_groups
    assert [(group["weight_decay"], [p.dim() for p in group["params"]]) for group in groups] == [
        (0.1, [2]),
        (0.0, [1, 1, 1]),
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(steps=0), "steps must be at least 1, got 0"),
        (lambda: TrainConfig(sp=3, data=DataConfig(seq_len=2)), "data.seq_len=2 has fewer tokens than sp=3"),
        (lambda: TrainConfig(overwrite=True, resume="latest"), "overwrite = true and resume = 'latest'"),
        (lambda: OptimizerConfig(lr=1e-3, min_lr=1e-2), "min_lr=0.01 and lr=0.001"),
        (lambda: DataConfig(batch_size=0), "data.batch_size must be at least 1, got 0"),
    ],
)
def test_impossible_settings_are_refused_with_their_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_reader_that_goes_away_does_not_end_the_run(monkeypatch):
    """As in `lasp train ... | head -1`: rich would end the process."""

    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

        def fileno(self) -> int:
            return -1

    redirected = []
    monkeypatch.setattr(os, "dup2", lambda _, to: redirected.append(to))
    monkeypatch.setattr(sys, "stdout", Gone())
    with TrainingProgress(steps=1, steps_done=0, enabled=True) as shown:
        shown.update(StepMetrics(1, 5.0, 1e-3, 1.0, 100.0))
    assert redirected == [-1]
