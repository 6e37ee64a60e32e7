"""The benchmark command on a small shape: that it runs and what it writes, not how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

import lasp
from lasp.launch.bench import main
from lasp.launch.bench.kernels import Shape, _inputs


def test_bench_kernels_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert (
        main(["kernels", "--tokens", "512", "--heads", "1", "--dim", "32", "--repeat", "1", "--json", str(file)]) == 0
    )
    figures = json.loads(file.read_text())
    ours, peer = figures["seconds"]["lasp linear_attention"], figures["seconds"][figures["best_peer"]]
    assert figures["times_faster"] == peer / ours
    assert set(figures["peak_bytes"]) == {"lasp linear_attention", figures["best_peer"]}
    assert 0 < figures["share_of_matmul_peak"] < 1
    assert "times faster than transformers" in " ".join(capsys.readouterr().out.split())


def test_our_contestant_and_the_peer_compute_the_same() -> None:
    """A benchmark of two different things would measure nothing."""
    (q, k, v, log_decay), _ = _inputs(Shape(tokens=256, heads=2, dim=32))
    with torch.no_grad():
        ours = lasp.linear_attention(q, k, v, log_decay, scale=1.0)
        # Mamba-2 multiplies the values by dt = -log_decay.
        scan = getattr(mamba2_chunk_scan, "__wrapped__", mamba2_chunk_scan)
        peer = scan(v / -log_decay.unsqueeze(-1), -log_decay, -torch.ones(2), k, q, 64)
    torch.testing.assert_close(ours, peer, rtol=1e-3, atol=1e-3)


def test_bench_attention_measures_every_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    shape = ["--ranks", "2", "--tokens", "256", "--heads", "2", "--dim", "16", "--repeat", "1"]
    assert main(["attention", *shape, "--json", str(file)]) == 0
    run = json.loads(file.read_text())["ranks"]["2"]
    assert run["times_faster"] == run["seconds"][run["best_peer"]] / run["seconds"]["lasp ring, zigzag"]
    assert len(run["seconds"]) == 6
    assert "2 ranks: our ring on zigzag is" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_bench_convergence_trains_every_mixer_and_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plot = tmp_path / "figures.json", tmp_path / "losses.png"
    assert main(["convergence", "--mixers", "linear", "--steps", "2", "--json", str(file), "--plot", str(plot)]) == 0
    runs = json.loads(file.read_text())["runs"]
    assert [(run["mixer"], run["pattern"]) for run in runs] == [
        ("linear", "pure"),
        ("linear", "1/4 hybrid"),
        ("softmax", "pure"),
    ]
    assert all(len(run["curves"][0]) == 2 and 5 < run["loss"] < 6 for run in runs)  # about ln 257 before it has learnt
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"{runs[0]['loss']:.3f}" in capsys.readouterr().out


def test_bench_convergence_says_why_a_run_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown mixer 'none'"):
        main(["convergence", "--mixers", "none", "--steps", "1"])
