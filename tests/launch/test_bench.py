"""The benchmark command on a small shape: that it runs and what it writes, not how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

import lasp
from lasp.launch.bench import Shape, _inputs, main


def test_bench_kernels_writes_what_it_measured(tmp_path: Path, capsys) -> None:
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
