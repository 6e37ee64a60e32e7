"""Files that cannot be written are found before the work, by every command that takes one; nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from lasp.launch import bench, cli
from lasp.launch.files import check_outputs


@pytest.mark.parametrize(("file", "told"), [
    ("none/figures.json", "cannot be written: No such file or directory"),
    (".", "--json must be a file, got the folder"),
    ("file/figures.json", "cannot be written: Not a directory"),
])  # fmt: skip
def test_what_cannot_be_written(file: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=told):
        check_outputs({"--json": tmp_path / file})


def test_what_can_is_left_as_it_is(tmp_path: Path) -> None:
    there, new = tmp_path / "there", tmp_path / "new"
    there.write_text("kept", encoding="utf-8")
    check_outputs({"--json": there, "--write": new, "--trace": None})
    assert there.read_text(encoding="utf-8") == "kept"
    assert [*tmp_path.iterdir()] == [there]


def test_one_file_twice_and_pictures_of_no_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--json and --write are the same file"):
        check_outputs({"--json": tmp_path / "a", "--write": tmp_path / "a"})
    with pytest.raises(ValueError, match=r"--plot must end in .png, .svg, .pdf, got .*lengths.txt"):
        check_outputs({"--plot": tmp_path / "lengths.txt"})


@pytest.mark.parametrize("command", [
    ["plan", "--model", "tiny", "--seq", "64", "--tokens-per-step", "64", "--json"],
    ["plan", "--model", "tiny", "--seq", "64", "--tokens-per-step", "64", "--trace"],
    ["doctor", "--ranks", "2", "--probe"],
    ["plot", "nowhere", "--output"],
])  # fmt: skip
def test_commands_find_it_first(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    file = "/nowhere/at/all.png"
    assert cli.main([*command, file]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"lasp: error: {command[-1]} {file!r} cannot be written: No such file or directory"


@pytest.mark.parametrize("what", bench.BENCHMARKS)
def test_benchmarks_find_it_first(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main([what, "--json", "/nowhere/at/all.json"])
    assert "--json '/nowhere/at/all.json' cannot be written" in capsys.readouterr().err
