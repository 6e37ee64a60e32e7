"""The lock of an output folder: one holder, gone with its process."""

import os
import signal
import subprocess
import sys

import pytest

from lasp.launch import lock
from lasp.launch.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from lasp.launch.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_holder_at_a_time_who_is_named(tmp_path):
    with locked(tmp_path / "new" / "run"):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "), locked(tmp_path / "new" / "run"):
            pytest.fail("held twice")
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "new" / "run"):
        pass


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by process {holder.pid} on "), locked(tmp_path):
            pytest.fail("held twice")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with locked(tmp_path):
            pass


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with locked(tmp_path):
        pass
    assert capsys.readouterr().err.startswith(f"lasp: warning: no lock on {str(tmp_path)!r} (Operation not supported)")


@pytest.mark.parametrize(("make", "told"), [(os.mkfifo, "it is no file"), (os.mkdir, "Is a directory")])
def test_a_lock_that_is_no_file_is_named(tmp_path, make, told):
    make(tmp_path / ".lock")
    with pytest.raises(ValueError, match=rf"cannot write to the output folder: '.*\.lock': {told}"), locked(tmp_path):
        pytest.fail("locked")


def test_a_full_disk_is_told_by_the_lock(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock.os, "pwrite", full)
    with pytest.raises(ValueError, match=r"\.lock': No space left on device$"), locked(tmp_path):
        pytest.fail("locked")


def test_the_lock_is_no_link_to_elsewhere(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="cannot write to the output folder"), locked(tmp_path):
        pytest.fail("followed")
    assert not (tmp_path / "elsewhere").exists()
