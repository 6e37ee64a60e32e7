"""Exchanges hide behind what the ranks compute: by the clock, over a wire that is slower than the cores."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lasp.launch.bench import main
from lasp.launch.bench.watch import Watch, Work, alone, watched
from lasp.launch.network import lacking
from lasp.parallel import collectives
from lasp.parallel.collectives import Pending


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(lacking() is not None, reason=str(lacking()))
def test_scans_hide_behind_the_kernels(tmp_path: Path) -> None:
    """Forward and backward: a scan sets out before its rank goes on to compute, has arrived when that is done, and
    less than a tenth of its time is waited for."""
    file = tmp_path / "figures.json"
    scans = ["--ranks", "2", "--scans", "gather", "ring", "pipeline", "--blocks", "4"]
    layers = ["--layers", "decay", "delta", "--tokens", "2048", "--heads", "8", "--mib", "1", "--repeat", "3"]
    assert main(["scan", *scans, *layers, "--emulate", "rate=1gbit", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["networks"][0]["layers"]
    assert [(row["layer"], row["method"]) for row in rows] == [
        (layer, scan) for layer in ("decay", "delta") for scan in ("gather", "ring", "pipeline(blocks=4)")
    ]
    for row in rows:
        assert row["after"] < 0, row
        assert row["late"] < 0, row
        assert row["waited"] < 0.1 * row["flight"], row


def work(seconds: float) -> Any:
    """As one of torch's that takes so long."""
    done = threading.Event()
    threading.Timer(seconds, done.set).start()
    return SimpleNamespace(wait=done.wait)


def test_a_watch_sees_what_hides_and_what_does_not() -> None:
    with watched() as watch:
        hidden = collectives.Pending([work(0.02), work(0.03)], 1)
        time.sleep(0.06)
        assert hidden.wait() == 1
        assert 0.025 < watch.flight < 0.06, "both at once"
        assert watch.waited < 0.02
        assert watch.late < 0
        collectives.Pending([work(0.05)], 2).wait()
        assert watch.waited > 0.04
        assert watch.late > 0.04
    assert collectives.Pending is Pending


def test_what_fails_on_its_way_is_raised_where_it_is_awaited() -> None:
    def fail() -> None:
        raise RuntimeError("gone")

    followed = Work(Watch(), SimpleNamespace(wait=fail))
    with pytest.raises(RuntimeError, match="gone"):
        followed.wait()


def test_alone_nothing_is_sent() -> None:
    nobody: Any = None
    with alone():
        assert collectives.send(torch.ones(2), 1, nobody, 0).wait().tolist() == [1, 1]
        assert collectives.receive(torch.ones(2), 1, nobody, 0).wait().tolist() == [0, 0]
        assert collectives.reduce_scatter(torch.ones(2, 3), nobody, "backward").wait().tolist() == [1, 1, 1]
