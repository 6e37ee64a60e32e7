"""The launcher of one machine's ranks, with ranks that import nothing and do as one line of Python says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from lasp.launch import rank as entry
from lasp.launch import ranks as launcher
from lasp.launch.ranks import run_ranks

RANK = f"""
import importlib.util, os, signal, sys, time
from pathlib import Path

spec = importlib.util.spec_from_file_location("entry", {entry.__file__!r})
entry = importlib.util.module_from_spec(spec)
spec.loader.exec_module(entry)
parent, folder, rank, size, module, *lines = sys.argv[1:]
entry.tie(int(parent))
signal.signal(signal.SIGINT, signal.SIG_DFL)

def report(message="", code=1, **more):
    entry.write_outcome(entry.outcome_file(Path(folder), int(rank)), dict(code=code, message=message, **more))
    os._exit(code)

def after(other):
    while not entry.outcome_file(Path(folder), other).exists():
        sleep(0.01)

def ready():
    Path(module, "ready-" + rank).touch()

sleep = time.sleep
exec(lines[int(rank)])
"""
"""A rank's file, in the place of launch/rank.py: rank r executes the r-th argument."""


@pytest.fixture(autouse=True)
def litter(tmp_path, monkeypatch):
    """Ranks of that file, short waits, and a temporary folder of our own, which every test leaves empty."""
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(entry, "__file__", str(tmp_path / "rank.py"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(launcher, "SETTLE", 0.3)
    monkeypatch.setattr(launcher, "GRACE", 0.5)
    monkeypatch.setattr(launcher, "FAREWELL", 0.5)
    yield
    assert os.listdir(tmp_path / "temporary") == []


def send(folder: Path, *numbers: int) -> None:
    """Send signals to this process when both ranks have called `ready()`, one after another."""

    def work() -> None:
        while len(list(folder.glob("ready-*"))) < 2:
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    threading.Thread(target=work, daemon=True).start()


@pytest.mark.parametrize(
    ("lines", "code", "told"),
    [
        (["report(code=0)", "report(code=0)"], 0, ""),
        (["report(code=0)", "report(code=1)"], 1, ""),  # a verdict of the command, no error
        (["report('no such file', 2)", "report('no such file', 2)"], 2, "no such file"),
        (["sleep(300)", "report('no such file', 2)"], 2, "rank 1: no such file"),
        (["after(1); report('second')", "report('first')"], 1, "rank 1: first"),
        (["report('Connection closed', lost_peer=True)", "after(0); report('the cause')"], 1, "rank 1: the cause"),
        (["report('Connection closed', lost_peer=True)", "sleep(300)"], 1, "rank 0: Connection closed"),
        (["sleep(300)", "os.kill(os.getpid(), 9)"], 1, "rank 1: killed by SIGKILL"),
        (["os.kill(os.getpid(), signal.SIGSEGV)", "sleep(300)"], 1, "rank 0: killed by SIGSEGV"),
        (["sleep(300)", "os.kill(os.getpid(), 40)"], 1, "rank 1: killed by signal 40"),
        (["sleep(300)", "os._exit(70)"], 70, ""),  # its watchdog has said why
        (["os._exit(1)", "sleep(0.1); os._exit(70)"], 70, ""),
        (["sleep(300)", "os._exit(3)"], 1, "rank 1: left with exit code 3 while others were"),
        (["report('left alone', lost_peer=True)", "sys.exit(0)"], 1, "rank 1: left with exit code 0 while others were"),
        (["after(1); report('the end')", "report(code=0)"], 1, "rank 0: the end"),
        (["report('a', 2)", "signal.signal(15, signal.SIG_IGN); sleep(300)"], 2, "rank 0: a"),
        (["os.kill(os.getpid(), 9)", "os.kill(os.getpid(), signal.SIGSTOP)"], 1, "rank 0: killed by SIGKILL"),
    ],
)
def test_the_rank_that_failed_first_is_named_in_one_line(capfd, lines, code, told):
    assert run_ranks("module", lines, 2) == code
    stderr = capfd.readouterr().err
    assert stderr.startswith(f"lasp: error: {told}") if told else not stderr
    assert stderr.count("\n") == bool(told), stderr


def test_the_details_of_the_first_alone_come_before_the_line(capfd):
    lines = [f"report('it {rank}', details='Traceback {rank}\\n')" for rank in range(3)]
    assert run_ranks("module", [lines[0], f"after(0); {lines[1]}", f"after(1); {lines[2]}"], 3) == 1
    assert capfd.readouterr().err == "Traceback 0\nlasp: error: rank 0: it 0\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_once(capfd, tmp_path, monkeypatch, number):
    monkeypatch.setattr(launcher, "GRACE", 20)
    note = f"signal.signal({number}, lambda *_: open(module + '/' + rank, 'a').write('x')); ready()"
    wait = "while not Path(module, rank).exists(): sleep(0.01)"
    send(tmp_path, number)
    # SIGINT as for a script's job in the background; SIGHUP as without nohup, under which these tests may run.
    before = {n: signal.signal(n, to) for n, to in ((signal.SIGINT, signal.SIG_IGN), (signal.SIGHUP, signal.SIG_DFL))}
    try:
        assert run_ranks(str(tmp_path), [f"{note}\n{wait}\nsleep(0.3); report('late')"] * 2, 2) == 128 + number
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert capfd.readouterr().err == f"lasp: error: stopped by {number.name}\n"
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["x", "x"]


@pytest.mark.parametrize(("numbers", "grace"), [([signal.SIGINT], 0.3), ([signal.SIGTERM, signal.SIGINT], 60)])
def test_who_does_not_end_in_time_or_at_the_second_signal_is_killed(capfd, tmp_path, monkeypatch, numbers, grace):
    monkeypatch.setattr(launcher, "GRACE", grace)
    send(tmp_path, *numbers)
    deaf = "[signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; ready(); sleep(300)"
    assert run_ranks(str(tmp_path), [deaf, "ready(); sleep(300)"], 2) == 128 + numbers[0]
    assert capfd.readouterr().err == f"lasp: error: stopped by {numbers[0].name}\n"


@pytest.mark.parametrize(
    ("second", "code", "told"),
    [
        ("report(code=75)", 75, ""),
        ("report('lost', 1, lost_peer=True)", 128 + signal.SIGUSR1, "stopped by SIGUSR1"),
        ("report(code=0)", 75, ""),
    ],
)
def test_ranks_that_come_to_their_end_after_a_signal_say_how(capfd, tmp_path, monkeypatch, second, code, told):
    """Longer than `GRACE`, as long as none of them fails."""
    send(tmp_path, signal.SIGUSR1)
    lines = [
        f"signal.signal(10, lambda *_: ({wait}, {end})); ready(); sleep(300)"
        for wait, end in (("sleep(1)", "report(code=75)"), ("sleep(0.7)", second))
    ]
    monkeypatch.setattr(launcher, "GRACE", 0.1)
    assert run_ranks(str(tmp_path), lines, 2, patience=60) == code
    assert capfd.readouterr().err == (f"lasp: error: {told}\n" if told else "")


@pytest.mark.parametrize("first", [signal.SIGUSR1, signal.SIGTERM])
def test_a_further_sigusr1_says_nothing_new(first):
    """Schedulers send it more than once, and ranks that save are to come to their end."""
    with launcher._signals() as received:
        for number in (first, signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            signal.raise_signal(number)
    assert received == [first, signal.SIGTERM]


@pytest.mark.parametrize("closed", [">&-", "<&- >&-", "<&- >&- 2>&-", "2>&-"])
def test_missing_descriptors_are_filled(tmp_path, closed):
    code = (
        "from lasp.launch.cli import fill_descriptors; import os, sys\n"
        "fill_descriptors(); print(1); sys.stdout.flush()\n"
        "print(2, file=sys.stderr, flush=True); assert sys.stdin is not None; [os.fstat(n) for n in range(3)]\n"
        f"assert os.open({str(tmp_path / 'first')!r}, os.O_CREAT) > 2"
    )
    (tmp_path / "code.py").write_text(code)
    command = f"exec {sys.executable} {tmp_path / 'code.py'} {closed}"
    assert subprocess.run(command, shell=True, stdout=subprocess.DEVNULL, timeout=120).returncode == 0


def test_what_nohup_ignores_stays_ignored(capfd, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        send(tmp_path, signal.SIGHUP)
        assert run_ranks(str(tmp_path), ["ready(); sleep(0.5); report(code=0)"] * 2, 2) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert not capfd.readouterr().err


def test_a_rank_is_told_its_place_and_speaks_on_the_loopback_only(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    write = f"import json; json.dump(dict(os.environ), open('{tmp_path}/' + rank, 'w')); report(code=0)"
    assert run_ranks("module", [write] * 3, 3) == 0
    for rank in range(3):
        told = json.loads((tmp_path / str(rank)).read_text())
        assert told["RANK"] == told["LOCAL_RANK"] == str(rank)
        assert told["WORLD_SIZE"] == told["LOCAL_WORLD_SIZE"] == "3"
        assert told["OMP_NUM_THREADS"] == "2"
        assert told["GLOO_SOCKET_IFNAME"] == told["NCCL_SOCKET_IFNAME"] == ("lo" if sys.platform == "linux" else "lo0")
    assert "RANK" not in os.environ


def alive(pid: int) -> bool:
    """Whether there is such a process that is more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.timeout(120)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_rank_outlives_a_killed_launcher(tmp_path):
    """Ten launchers, each killed at another moment of its ranks' first second."""
    script = f"""
import glob, os, time
from lasp.launch import rank, ranks
rank.__file__ = {str(tmp_path / "rank.py")!r}
line = "open({str(tmp_path)!r} + '/pid-' + str(os.getpid()), 'w'); sleep(60)"
for place in range(10):
    launcher = os.fork()
    if not launcher:
        ranks.run_ranks("module", [line, line], 2)
    time.sleep(0.01 * place ** 2)
    while place == 9 and not glob.glob({str(tmp_path)!r} + "/pid-*"):
        time.sleep(0.1)
    os.kill(launcher, 9)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=110)
    time.sleep(0.5)  # for ranks that had not come to their first line
    ranks = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
    assert ranks
    assert not [pid for pid in ranks if alive(pid)]


def test_elsewhere_a_rank_follows_its_parent_by_asking_for_it(monkeypatch):
    """macOS has no signal of a parent's death."""
    parents, ended = iter([7, 7, 1]), []
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "_exit", ended.append)
    entry._follow(7, seconds=0)
    assert ended == [1]
