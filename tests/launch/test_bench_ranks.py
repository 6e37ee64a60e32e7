"""The ranks of a benchmark tell what they found, and none outlives the others or who started them."""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path

import pytest

from lasp.launch.bench.ranks import Start, run

SCRIPT = """
import json, os, sys, time
rank, fails, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
open(f"{folder}/{rank}", "w").write(str(os.getpid()))
if fails == rank:
    sys.exit(3)
if fails >= 0:
    time.sleep(60)
if rank == 0:
    print("a word"), print(json.dumps({"rank": rank, "place": os.environ["PLACE"]}))
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    return str(tmp_path / "script.py")


def starts(fails: int, folder: Path) -> list[Start]:
    return [Start([str(rank), str(fails), str(folder)], {"PLACE": f"p{rank}"}) for rank in range(2)]


def alive(folder: Path) -> list[int]:
    pids = [int((folder / str(rank)).read_text() or 0) for rank in range(2) if (folder / str(rank)).exists()]
    return [pid for pid in pids if pid and Path(f"/proc/{pid}").exists() and "Z" not in state(pid)]


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_what_each_found(script: str, tmp_path: Path) -> None:
    assert run(script, starts(-1, tmp_path)) == [{"rank": 0, "place": "p0"}, {}]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_to_fail_ends_the_others(script: str, tmp_path: Path, rank: int) -> None:
    with pytest.raises(RuntimeError, match=r"exit codes \[.*3.*\]"):
        run(script, starts(rank, tmp_path))
    assert not alive(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_rank_outlives_who_started_it(script: str, tmp_path: Path) -> None:
    starter = multiprocessing.get_context("fork").Process(target=run, args=(script, starts(9, tmp_path)))
    starter.start()
    while len(alive(tmp_path)) < 2:
        assert starter.is_alive()
        time.sleep(0.05)
    starter.kill()
    starter.join()
    until = time.monotonic() + 5
    while alive(tmp_path) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(tmp_path)
