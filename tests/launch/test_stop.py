"""A training that is told to stop: it saves at the next step's end, leaves with code 75, and goes on when resumed."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lasp.launch.cli import SAVED
from lasp.launch.stop import Stop
from lasp.launch.train import main
from lasp.train.metrics import read_metrics
from lasp.train.ranks import Ranks


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    """What a shell starts behind `&` ignores SIGINT, what nohup starts SIGHUP, and what these start in turn as well."""
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def steps() -> int:
    """More than anybody waits for."""
    return 100000


def checkpoints(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "run" / "checkpoints"))


def wait_for_steps(folder: Path, done: int) -> None:
    """Until so many steps are in the metrics of a run, or a minute and a half is over."""
    metrics = folder / "run" / "metrics.jsonl"
    for _ in range(1800):
        if metrics.exists() and metrics.read_text().count("\n") >= done:
            return
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_at_the_end_of_a_step_and_the_run_goes_on_later(recipe, tmp_path, capsys, number):
    before = signal.getsignal(number)

    def tell() -> None:
        wait_for_steps(tmp_path, 2)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=tell)
    thread.start()
    assert main([recipe]) == SAVED == 75
    thread.join()
    [saved] = checkpoints(tmp_path)
    steps = int(saved.removeprefix("step-"))
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == steps >= 2
    told = capsys.readouterr().err.splitlines()[-1]
    path = tmp_path / "run" / "checkpoints" / saved
    assert told == f"lasp: told to stop by {signal.Signals(number).name}, saved {path}: --resume latest goes on"
    assert signal.getsignal(number) == before
    assert main([recipe, "--resume=latest", f"--steps={steps + 2}"]) == 0
    assert [step.step for step in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, steps + 3))


def test_a_limit_of_time_saves_and_ends_the_run(recipe, tmp_path, capsys, monkeypatch):
    leave = Ranks.leave  # a signal that comes late, where others were told first, ends nobody
    monkeypatch.setattr(Ranks, "leave", lambda self: os.kill(os.getpid(), signal.SIGTERM) or leave(self))
    assert main([recipe, "--time_limit=1e-3"]) == SAVED
    assert "told to stop by the time limit, saved" in capsys.readouterr().err
    assert checkpoints(tmp_path) == ["step-000001"]
    assert main([recipe, "--steps=2", "--time_limit=1e-3", "--resume=latest"]) == 0  # the last step is no stop
    assert main([recipe, "--time_limit=0"]) == 2
    assert "time_limit must be positive, got 0" in capsys.readouterr().err


def test_a_signal_is_heard_once_and_the_second_is_as_ever():
    stop = Stop()
    with stop.listening():
        assert not stop()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)  # a scheduler may repeat itself
        assert stop()
        assert stop.reason == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.reason == "SIGUSR1"


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        stop = Stop()
        with stop.listening():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert not stop()
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("one_rank", [False, True])
def test_two_ranks_stop_together_whoever_is_told(recipe, tmp_path, one_rank):
    """Told by their launcher; or one of them alone, as on one of two machines."""
    command = [sys.executable, "-m", "lasp.launch.cli", "train", recipe, "--sp", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        wait_for_steps(tmp_path, 2)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[1]) if one_rank else run.pid, signal.SIGTERM)
        said = run.communicate(timeout=60)[1]
    assert run.returncode == SAVED, said
    assert len(checkpoints(tmp_path)) == 1
    reason = "another rank" if one_rank else "SIGTERM"
    assert said.splitlines()[-1].startswith(f"lasp: told to stop by {reason}, saved ")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_terminal_that_is_closed_stops_the_run_which_saves(recipe, tmp_path):
    """What the run says from then on, to nobody, is no error."""
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-m", "lasp.launch.cli", "train", recipe, "--sp", "2"])
    wait_for_steps(tmp_path, 2)
    os.close(terminal)  # the system sends SIGHUP
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == SAVED
    assert len(checkpoints(tmp_path)) == 1
