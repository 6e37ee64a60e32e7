"""`lasp runs` and `lasp plot`, on folders as runs leave them."""

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from lasp.launch import plot, runs
from lasp.launch.lock import holder, locked
from lasp.train.metrics import StepMetrics
from lasp.train.plot import draw, smoothed
from lasp.train.status import Status


def leave(folder: Path, steps: int, saved: int | None, of: int = 4, there: bool = False) -> Path:
    """What a run of `of` steps leaves after some of them."""
    folder.mkdir(parents=True, exist_ok=there)
    lines = [
        {"step": n + 1, "loss": 5.0 - n, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 9.0} for n in range(steps)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if saved is not None:
        checkpoint = folder / "checkpoints" / f"step-{saved:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "run.json").write_text(json.dumps({"steps": of}))
    return folder


def test_runs_are_listed_with_state_and_last_step(tmp_path, capsys):
    leave(tmp_path / "a", 4, 4)
    leave(tmp_path / "b", 3, 2)
    leave(tmp_path / "c", 1, None)
    leave(tmp_path / "d", 2, 1)
    (tmp_path / "e").mkdir()
    with locked(tmp_path / "d"):
        assert runs.main([str(tmp_path)]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    found = [[word.strip() for word in line if word.strip()][:5] for line in lines]
    assert found == [
        ["run", "state", "step", "loss", "saved"],
        ["a", "done", "4/4", "2.000", "4"],
        ["b", "stopped", "3/4", "3.000", "2"],
        ["c", "no checkpoint", "1", "5.000", found[3][4]],
        ["d", "running", "2/4", "4.000", "1"],
    ]
    assert [state.name for state in runs.find_runs(tmp_path / "a")] == ["a"]


def test_a_list_of_runs_says_nothing_to_the_terminal_but_text(tmp_path, capsys):
    folder = leave(tmp_path / "a\nb", 2, None)
    Status("failed", 9, "\x1b[31mred\x1b[0m \a").write(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("{}\n" * 3)
    with pytest.warns(
        UserWarning, match=r"line 3 is no step of a run: it has no step, loss, .* \(and 2 more\)"
    ) as told:
        assert runs.main([str(tmp_path)]) == 0
    assert len(told) == 1
    _, line = capsys.readouterr().out.splitlines()
    assert line.startswith("a?b  failed")
    assert line.endswith("?[31mred?[0m ?")


def test_who_holds_a_folder_is_told_without_holding_it(tmp_path):
    assert holder(tmp_path) is None
    with locked(tmp_path):
        assert holder(tmp_path).startswith("process ")
    assert holder(tmp_path) is None


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_runs_are_drawn_into_one_picture(tmp_path, capsys, suffix):
    folders = [str(leave(tmp_path / name, 4, 4)) for name in "ab"]
    picture = tmp_path / f"both.{suffix}"
    assert plot.main([*folders, "--output", str(picture), "--smooth", "2"]) == 0
    assert capsys.readouterr().out == f"{picture}\n"
    assert picture.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


def test_losses_are_smoothed_over_the_steps_before_that_have_one():
    assert smoothed([4.0, 2.0, 3.0, 1.0], 2) == [4.0, 3.0, 2.5, 2.0]
    assert smoothed([4.0, 2.0], 1) == [4.0, 2.0]
    assert smoothed([4.0, float("nan"), 2.0, float("inf")], 2) == [4.0, 4.0, 2.0, 2.0]


def test_a_run_that_was_told_to_stop_and_those_that_failed_or_were_killed_are_told_apart(tmp_path):
    for name, word, told in (("a", "stopped", ""), ("b", "failed", "OSError: no\nspace"), ("c", "running", "")):
        Status(word, 9, told).write(leave(tmp_path / name, 3, 2))
    (leave(tmp_path / "d", 4, 4) / "status.json").write_text('{"word": "done"')
    with locked(tmp_path / "e"):
        Status("running", 9).write(leave(tmp_path / "e", 3, None, there=True))
        found = [(state.word, state.step, state.steps, state.told) for state in runs.find_runs(tmp_path)]
    assert found == [
        ("stopped", 3, 9, ""),
        ("failed", 3, 9, "OSError: no space"),
        ("crashed", 3, 9, ""),
        ("done", 4, 4, ""),
        ("running", 3, 9, ""),
    ]


def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys):
    run = str(leave(tmp_path / "a", 2, None))
    for main, arguments, said in (
        (runs.main, ["/nowhere/at/all"], "'/nowhere/at/all' is no folder"),
        (plot.main, [], "RUN"),
        (plot.main, [str(tmp_path)], "is no run with steps"),
        (plot.main, [run, "--output", "loss.gif"], "--output must end in .png, .svg, .pdf, got 'loss.gif'"),
        (plot.main, [run, "--smooth", "0"], "--smooth must be at least 1, got 0"),
    ):
        assert main(arguments) == 2
        line = capsys.readouterr().err
        assert line.startswith("lasp: error: ")
        assert line.count("\n") == 1
        assert said in line


def test_held_out_losses_are_drawn_too(tmp_path):
    step = StepMetrics(1, 2.0, 1e-3, 1.0, 9.0, validation={"books": 3.0})
    draw({"a": [step]}, tmp_path / "a.svg")
    assert "held out of books" in (tmp_path / "a.svg").read_text()


def test_names_of_folders_are_drawn_as_they_are(tmp_path):
    steps = [StepMetrics(n, 2.0, 1e-3, 1.0, 9.0, validation={"caf\udce9": 3.0}) for n in (1, 2)]
    with mpl.rc_context({"svg.fonttype": "none"}):
        draw({"_hidden": steps, "lr$\\no$": steps}, tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert "_hidden" in drawn
    assert "lr$\\no$" in drawn
    assert "caf?" in drawn


def test_nothing_of_a_picture_stays_in_memory(tmp_path):
    """Each would be megabytes until Python looks through all that is old, which it hardly ever does."""
    before = {id(one) for one in gc.get_objects() if isinstance(one, Figure)}
    draw({"a": [StepMetrics(1, 2.0, 1e-3, 1.0, 9.0)]}, tmp_path / "a.png")
    assert {id(one) for one in gc.get_objects() if isinstance(one, Figure)} <= before


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_a_file_holds_nobody_up(tmp_path):
    run = leave(tmp_path / "a", 2, 2)
    for name in ("metrics.jsonl", ".lock", "status.json"):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
    [state] = runs.find_runs(tmp_path)
    assert (state.word, state.step) == ("stopped", 2)
    (run / "status.json").unlink()
    (run / "status.json").write_text('{"word": "failed", "steps": 4, "told": 5}')
    [state] = runs.find_runs(tmp_path)
    assert state.word == "stopped"
    [checkpoint] = (run / "checkpoints").iterdir()
    (checkpoint / "run.json").unlink(missing_ok=True)
    os.mkfifo(checkpoint / "run.json")
    [state] = runs.find_runs(tmp_path)
    assert (state.word, state.steps) == ("stopped", None)


def test_a_run_that_cannot_be_read_hides_no_other(tmp_path, monkeypatch):
    for name in "ab":
        leave(tmp_path / name, 2, 2)
    iterdir = Path.iterdir

    def fail(path: Path) -> Iterator[Path]:
        if path.parent.name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", fail)
    first, second = runs.find_runs(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "a")
    assert len(runs.find_runs(tmp_path)) == 2
    assert (first.name, first.word, second.name, second.word) == ("a", "unreadable", "b", "stopped")
    assert first.told.startswith("[Errno 13] Permission denied")
