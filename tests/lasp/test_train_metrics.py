"""The metrics file, the plot, what a run shows, the optimizer's schedule, and the checks of a configuration."""

import errno
import io
import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from lasp.parallel import agreement
from lasp.train.chips import known_peak
from lasp.train.config import DataConfig, OptimizerConfig, TrainConfig
from lasp.train.flops import weight_flops
from lasp.train.log import logged
from lasp.train.metrics import MetricsFile, StepMetrics, read_metrics
from lasp.train.optimizer import build_optimizers, learning_rate
from lasp.train.progress import TrainingProgress, line
from lasp.train.ranks import agree_on_config
from lasp.train.tracker import check_tracker


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


WHOLE = '{"step": 2, "loss": %s, "lr": 0.1, "grad_norm": 1, "tokens_per_second": 9, "validation": %s}'


@pytest.mark.parametrize(
    "damage",
    [
        *("", "{}", "[]", "null", "NaN", '{"step": "1"', "\x00", '{"step": 1, "loss": "low"}', "[" * 9999),
        WHOLE % ("1" + "0" * 400, "null"),
        WHOLE % ("1", "[2.0]"),
        WHOLE % ("1", '{"a": "low"}'),
        WHOLE % ("1", '{"a": {"b": 1}}'),
        WHOLE % ("1", '{"a": null}'),
    ],
    ids=range(14),
)
def test_a_line_that_is_no_step_is_left_out_with_a_warning_that_names_it(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.write(of_step(1))
    with path.open("a") as more:
        more.write(damage + "\n")
    with pytest.warns(UserWarning, match=r"metrics.jsonl', line 2 is no step of a run"):
        assert read_metrics(path) == [of_step(1)]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_has_no_steps(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match=r"Input/output error: '.*metrics\.jsonl'"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_fields_of_a_later_version_are_passed_over(tmp_path):
    told = {"step": 1, "loss": 5.0, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 1234.5, "later": [1]}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(told) + "\n")
    assert read_metrics(tmp_path / "metrics.jsonl") == [of_step(1)]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    def full(_: object) -> str:
        raise OSError(28, "No space left on device")

    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        monkeypatch.setattr("lasp.train.metrics._line", full)
        with pytest.raises(OSError, match=r"No space left on device: .*metrics.jsonl"):
            file.write(of_step(1))


def test_a_line_of_the_log_has_units_and_only_what_is_known():
    assert line(of_step(2)) == "loss 2.500  norm 0.5  lr 0.001  1,234 tokens/s"
    told = line(
        replace(of_step(2), seconds=0.25, received=3e6, mfu=0.125, memory=2 * 10**9, slowest_rank=3, slowest_by=0.1)
    )
    assert told.endswith("0.25 s a step  received 3 MB  MFU 12.5%  memory 2 GB  rank 3 slowest by 0.1 s")


def test_warnings_of_any_rank_are_in_the_log(tmp_path, capsys):
    for rank in (0, 3):
        with logged(tmp_path / "log.txt", rank) as say:
            say(f"step {rank}")
            logging.getLogger("somebody").info("nothing")
            logging.getLogger("somebody").warning("beware\nof it")
            warnings.warn(f"mind {rank}", stacklevel=1)
    lines = [text[24:] for text in (tmp_path / "log.txt").read_text().splitlines()]
    host = socket.gethostname()
    assert lines[:2] == ["step 0", "warning: beware of it"]
    assert lines[3:5] == [f"rank 3 on {host}: step 3", f"rank 3 on {host}: warning: beware of it"]
    assert ["mind" in text for text in lines] == [False, False, True, False, False, True]


def test_an_output_on_a_full_disk_ends_no_run(capsys):
    script = (
        "from lasp.train.progress import show\nimport sys\nfor line in ('one', 'two'):\n    show([line])\n"
        "print('three', flush=True)"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (done.returncode, done.stderr) == (0, "cannot write to the standard output: No space left on device\n")


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989.5),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756.0),
        ("NVIDIA A100-SXM4-80GB", torch.float32, True, 156.0),
        ("NVIDIA A100-SXM4-80GB", torch.float32, False, 19.5),
        ("NVIDIA L40S", torch.bfloat16, False, 362.0),
        ("NVIDIA GB200", torch.bfloat16, False, 2500.0),
        ("NVIDIA T1000", torch.bfloat16, False, None),
    ],
)
def test_the_peak_of_a_chip_is_found_by_its_name(name, dtype, tf32, teraflops):
    assert known_peak(name, dtype, tf32) == (None if teraflops is None else teraflops * 1e12)


@pytest.mark.parametrize(
    ("tracker", "said"),
    [
        ("wandb", 'tracker = "wandb" needs its package: pip install wandb'),
        ("paper", "tracker must be one of aim, .*paper"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused(monkeypatch, tracker, said):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ValueError, match=said):
        check_tracker(tracker)


def test_of_experts_a_token_meets_those_that_are_chosen():
    model = torch.nn.Module()
    model.config = SimpleNamespace(num_experts=8, num_experts_per_tok=2)
    model.embedding, model.router = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 8, bias=False)
    model.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in range(8))
    layer = torch.nn.Module()
    layer.mlp = model
    model.router.requires_grad_(False)
    assert weight_flops(layer) == 4 * 32 + 6 * 8 * 16  # no configuration at hand: all of them
    layer.config = model.config
    assert weight_flops(layer) == 4 * 32 + 6 * 2 * 16


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


class Table:
    """Ranks that are threads, and lay what they say on one table."""

    def __init__(self, size: int) -> None:
        self.barrier, self.said = Barrier(size, timeout=20), [{}] * size

    def everyone(self, rank: int) -> SimpleNamespace:
        def agree(_: str, fields: dict, error: str | None = None) -> SimpleNamespace:
            assert len(json.dumps(fields)) < 300  # of the 1024 bytes of a header
            return SimpleNamespace(wait=lambda: self.compare(rank, fields))

        return SimpleNamespace(agree=agree)

    def compare(self, rank: int, fields: dict) -> None:
        self.said[rank] = fields
        self.barrier.wait()
        said = list(self.said)
        self.barrier.wait()
        agreement._compare(said)


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        ({"steps": 4}, {"steps": 5}, r"steps: rank 0: 4, rank 1: 5"),
        (
            {"optimizer": OptimizerConfig(lr=1.0)},
            {"optimizer": OptimizerConfig(lr=2.0)},
            r"optimizer.lr: rank 0: 1.0, ra",
        ),
        ({"model": {"preset": "1b"}}, {"model": {"preset": "8b"}}, r"model.preset: rank 0: '1b', rank 1: '8b'"),
        ({"model": {"preset": "1b"}}, {"model": {}}, r"the fields of model: rank 0: preset, rank 1: $"),
        ({"output": "a" * 900 + "b"}, {"output": "a" * 901}, r"output: rank 0: 'a{29}\.\.\. \(\w{8}\), rank 1: "),
        ({"output": "ä"}, {"output": "ö"}, r"output: rank 0: .*xe4.*, rank 1: .*xf6"),
        ({}, {}, None),
    ],
    ids=range(7),
)
def test_ranks_that_were_told_otherwise_name_the_field(one, two, said):
    table, configs = Table(2), [TrainConfig(**one), TrainConfig(**two)]

    def work(rank: int) -> str | None:
        try:
            return agree_on_config(table.everyone(rank), configs[rank])
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(work, range(2))
    assert first == second
    assert first is None if said is None else re.search(f"ranks disagree on {said}", first), first


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(steps=0), "steps must be at least 1, got 0"),
        (lambda: TrainConfig(sp=3, data=DataConfig(seq_len=2)), "data.seq_len=2 has fewer tokens than sp=3"),
        (lambda: TrainConfig(overwrite=True, resume="latest"), "overwrite = true and resume = 'latest'"),
        (lambda: OptimizerConfig(lr=1e-3, min_lr=1e-2), "min_lr=0.01 and lr=0.001"),
        (lambda: DataConfig(batch_size=0), "data.batch_size must be at least 1, got 0"),
        (lambda: TrainConfig(log_every=0), "log_every must be at least 1, got 0"),
        (lambda: TrainConfig(tracker=""), 'tracker must name a tracker, got ""'),
        (lambda: TrainConfig(profile="13:10"), "the first and the last step of a trace, as in .*, got '13:10'"),
        (lambda: TrainConfig(profile="10"), "the first and the last step of a trace, as in .*, got '10'"),
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
