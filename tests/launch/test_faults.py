"""What becomes of a training in which something fails: R1, R3 to R6, R9, R12 and R22 of docs/reliability.md."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lasp.launch.cli import SAVED, STUCK
from lasp.train.status import read_status
from tests.launch.forked import Training, alive
from tests.launch.tiny import losses, prepared, say, state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


@pytest.fixture
def folder(tmp_path):
    """Of a training of 200 steps."""
    return prepared(tmp_path, 200)


def test_twenty_kills_at_random_steps_and_ranks_change_nothing(tmp_path):
    """R1."""
    expected, folder = (prepared(tmp_path / name, 200) for name in ("undisturbed", "killed"))
    assert Training(expected, ["--sp", "2"]).end(300) == 0
    chance = random.Random(16)
    targets = sorted(chance.sample(range(1, 200), 20))
    training = Training(folder, ["--sp", "2", "--restarts", "25"])
    for target in targets:
        training.wait_for_steps(target)
        before = training.ranks()
        os.kill(before[chance.randrange(2)], signal.SIGKILL)
        while training.process.is_alive() and set(training.ranks()) & set(before):
            time.sleep(0.01)
    assert training.end(300) == 0, training.stderr.read_text()[-3000:]
    assert training.stderr.read_text().count("killed by SIGKILL") == 20
    assert state(folder, 200) == state(expected, 200)
    assert losses(folder) == losses(expected)
    say(f"R1: 20 kills, {time.monotonic() - training.began:.0f} s")


HOLD = "import ctypes; ctypes.PyDLL(None).sleep(1000)"
SKIP = "from lasp.train.ranks import Ranks; r = Ranks.total; Ranks.total = lambda s, n: setattr(Ranks, 'total', r) or n"
FAULTS = {
    "SIGKILL": ("os.kill(os.getpid(), 9)", "killed by SIGKILL"),
    "SIGTERM": ("import signal; signal.signal(15, signal.SIG_DFL); os.kill(os.getpid(), 15)", "killed by SIGTERM"),
    "SIGSEGV": ("os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
    "SIGSTOP": ("os.kill(os.getpid(), 19)", "said nothing"),
    "os._exit": ("os._exit(0)", "left with exit code 0"),
    "exception": ("raise RuntimeError('the cause')", "RuntimeError: the cause"),
    "skipped collective": (SKIP, "took longer than timeout = 10 s"),
    "GIL held": (HOLD, "said nothing"),
}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_run_in_time_and_by_name_and_a_restart_makes_good(folder, fault, rank):
    """R3; with a restart, so that both the end of an attempt and the recovery are seen."""
    line, told = FAULTS[fault]
    training = Training(folder, ["--sp", "2", "--steps", "12", "--restarts", "1"], {rank: line}, at=7)
    training.wait_for_steps(7)
    began, first = time.monotonic(), training.ranks()
    while training.process.is_alive() and set(training.ranks()) & set(first):
        time.sleep(0.01)
    seconds = time.monotonic() - began
    code = training.end(120)
    stderr = training.stderr.read_text()
    assert code == 0, stderr[-3000:]
    assert seconds < 20
    errors = re.findall("^lasp: error: .*$", stderr, re.MULTILINE)
    assert len(errors) == 1, errors
    assert told in errors[0]
    if fault != "skipped collective":
        assert f"rank {rank}" in errors[0]
    if fault in ("GIL held", "skipped collective"):
        assert stderr.count("most recent call first") >= 2
    assert losses(folder)[-1] > 0
    assert state(folder, 12)
    say(f"R3: {fault}, rank {rank}: {seconds:.1f} s, {errors[0][13:]}")


def test_a_watchdog_fires_in_time_and_names_who_lags(folder):
    """R4: 20 hangs of a rank at some step, alive or not."""
    chance, named, late = random.Random(4), 0, []
    for number in range(20):
        rank, at = chance.randrange(2), chance.randrange(1, 20)
        line = ["import time; time.sleep(1000)", "while True: pass", "os.kill(os.getpid(), 19)", HOLD][number % 4]
        run = prepared(folder / str(number), 40)
        training = Training(run, ["--sp", "2", "--timeout", "5"], {rank: line}, at=at)
        training.wait_for_steps(at)
        began = time.monotonic()
        assert training.end(60) == STUCK
        late.append(time.monotonic() - began - 5)
        stderr = training.stderr.read_text()
        assert f"step {at + 1} took longer than timeout = 5 s" in stderr
        named += bool(re.search(f"rank {rank} (is behind: step {at + 1}, |said nothing)", stderr))
        assert stderr.count("most recent call first") >= (1 if number % 4 == 2 else 2)
    assert named >= 19
    say(f"R4: {named} of 20 named, the run ended {min(late):.1f} to {max(late):.1f} s after the limit")


def test_a_killed_launcher_leaves_nothing(folder):
    """R5."""
    for number in range(10):
        training = Training(prepared(folder / str(number), 10**6), ["--sp", "2"])
        training.wait_for_steps(number * 3)
        ranks = training.ranks()
        os.kill(training.pid, signal.SIGKILL)
        training.end(5)
        began = time.monotonic()
        while any(alive(pid) for pid in ranks) and time.monotonic() - began < 5:
            time.sleep(0.01)
        assert not [pid for pid in ranks if alive(pid)]
    say("R5: 10 of 10")


@pytest.mark.parametrize("one_rank", [False, True])
def test_a_run_that_is_told_to_stop_saves_within_a_step(folder, one_rank):
    """R6: ten times, at the launcher or at one rank alone, as on one node of several."""
    seconds, done = [], 0
    for number in range(10):
        training = Training(folder, ["--sp", "2", "--resume", "latest", "--steps", "1000000"])
        training.wait_for_steps(done + 3 + number)
        seen = training.steps()
        os.kill(training.ranks()[number % 2] if one_rank else training.pid, signal.SIGTERM)
        began = time.monotonic()
        assert training.end(60) == SAVED, training.stderr.read_text()[-3000:]
        seconds.append(time.monotonic() - began)
        done = training.steps()
        assert done >= seen
        assert state(folder, done)
    assert max(seconds) < 20
    say(f"R6: 10 of 10 saved and left with 75, {max(seconds):.1f} s at most")


def test_clean_exits_leave_nothing(tmp_path):
    """R9: fifty runs of four ranks."""
    shared = set(os.listdir("/dev/shm"))
    for number in range(50):
        folder = prepared(tmp_path / str(number), 3)
        training = Training(folder, ["--sp", "4"])
        training.wait_for_steps(1)
        ranks = training.ranks()
        assert training.end(60) == 0, training.stderr.read_text()[-3000:]
        assert not [pid for pid in ranks if alive(pid)]
        assert sorted(name for name in os.listdir(folder) if name.startswith(("lasp-", "tmp", "torch_"))) == []
    assert set(os.listdir("/dev/shm")) <= shared
    say("R9: 50 of 50")


def test_a_long_run_holds_memory_threads_and_descriptors(folder):
    """R22: 5000 steps, what the second half adds to the first."""
    training = Training(folder, ["--sp", "2", "--steps", "5000", "--save_every", "500", "--timeout", "60"])
    looks = []
    for steps in (600, 4900):
        training.wait_for_steps(steps)
        looks.append([usage(pid) for pid in training.ranks()])
    assert training.end(600) == 0, training.stderr.read_text()[-3000:]
    for first, last in zip(*looks, strict=True):
        assert last["memory"] < 1.02 * first["memory"]
        assert last["threads"] == first["threads"]
        assert last["descriptors"] == first["descriptors"]
    say(f"R22: {looks}")


@contextmanager
def disk(folder: Path, size: int) -> Iterator[None]:
    """A disk of its own for a folder, of so many bytes."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no disk can be made here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_full_disk_ends_the_run_in_one_line_and_what_is_there_stays(tmp_path, background):
    """R12: a small one that is full, one that is made larger, one that is read-only."""
    expected, folder = (prepared(tmp_path / name, 60) for name in ("undisturbed", "full"))
    options = ["--sp", "2", "--async_save", background]
    assert Training(expected, options).end(120) == 0
    used = sum(path.stat().st_blocks * 512 for path in expected.rglob("run/**/*"))
    with disk(folder / "run", used // 2):
        training = Training(folder, options)
        assert training.end(60) == 1
        [line] = re.findall("^lasp: error: .*$", training.stderr.read_text(), re.MULTILINE)
        assert re.search(r"cannot save '.*/step-0000\d\d': .*No space left on device", line), line
        kept = sorted(os.listdir(folder / "run" / "checkpoints"))
        assert kept == [f"step-{step:06d}" for step in range(5, 5 * len(kept) + 1, 5)]
        assert 1 <= len(kept) < 12
        assert read_status(folder / "run").word == "failed"
        log = (folder / "run" / "log.txt").read_text()
        assert re.findall(r"checkpoint of step (\d+)", log) == [str(int(name[5:])) for name in kept]
        subprocess.run(["mount", "-o", f"remount,size={4 * used}", folder / "run"], check=True)
        assert Training(folder, [*options, "--resume", "latest"]).end(60) == 0
        assert state(folder, 60) == state(expected, 60)
        subprocess.run(["mount", "-o", "remount,ro", folder / "run"], check=True)
        again = Training(folder, [*options, "--resume", "latest", "--steps", "70"])
        assert again.end(60) == 2
        assert again.stderr.read_text().endswith("': Read-only file system\n")
    say(f"R12: {line[13:]}")


def usage(pid: int) -> dict[str, int]:
    """Resident bytes, threads and open descriptors of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    counts = {"threads": "task", "descriptors": "fd"}
    return {"memory": pages * os.sysconf("SC_PAGE_SIZE")} | {
        name: len(os.listdir(f"/proc/{pid}/{where}")) for name, where in counts.items()
    }
