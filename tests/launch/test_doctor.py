"""`lasp doctor`: verdicts, links between ranks, and ranks that do not reach each other."""

import json
import socket
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from lasp.launch import doctor, links, node
from lasp.launch.doctor import amiss, main
from lasp.launch.links import Pair, by_level, pairs, reach, write_links
from lasp.launch.place import Place
from lasp.parallel.wires import Wire, Wires

WELL = {
    "host": "a",
    "python": "3.11.2",
    "torch": "2.13.0",
    "cuda": "13.0",
    "nccl": "2.28.9 (nvidia-nccl-cu13 2.28.9)",
    "triton": "3.9.0",
    "devices": ["H100, 80 GiB"] * 2,
    "cores": 8,
    "memory": 1 << 36,
    "folder": "/runs",
    "disk": 2e9,
    "unwritable": "",
    "free": 1 << 40,
    "port": True,
    "range": [32768, 60999],
    "clock": 100.0,
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, []),
        ({"torch": "2.12.1"}, ["torch 2.12.1, but 2.13.0 on a"]),
        ({"nccl": "none", "cuda": "none"}, ["cuda none, but 13.0 on a", "nccl none, but 2.28.9"]),
        ({"devices": WELL["devices"][:1]}, ["2 ranks, but 1 GPUs"]),
        ({"devices": []}, []),  # ranks of CPUs
        ({"clock": 97.5}, ["its clock is -2.5 s off that of a"]),
        ({"disk": 4e6}, ["4 MB/s to /runs"]),
        ({"free": 1 << 30}, ["1.0 GiB left in /runs"]),
        (
            {"disk": 0.0, "unwritable": "No space left on device", "free": 0},
            ["cannot write to /runs: No space left on device", "0.0 GiB left in /runs"],
        ),
    ],
)
def test_a_verdict_names_what_is_amiss(changed, said):
    found = amiss({**WELL, "host": "b", **changed}, WELL, 2)
    assert len(found) == len(said)
    assert all(told.startswith(part) for told, part in zip(found, said, strict=True)), found


def test_a_torch_that_is_not_tested_is_told_on_one_machine():
    old = {**WELL, "torch": "2.10.0"}
    assert amiss(old, old, 1) == ["torch 2.10.0 is not one of 2.11 to 2.13"]


def test_what_is_measured_of_ranks_on_several_machines():
    assert pairs(["a", "a", "a", "b", "b", "c"]) == [
        Pair("node", 0, 1),
        Pair("node", 3, 4),
        Pair("network", 0, 3),
        Pair("network", 0, 5),
    ]
    assert pairs(["a"]) == []


def test_a_slow_machine_is_told_and_the_link_file_has_the_middle(capsys, tmp_path):
    seen = [{**WELL, "host": host} for host in "abcd"]
    speeds = {1: 10e9, 2: 2e9, 3: 12e9}
    measured = [(Pair("network", 0, rank), Wire(rank * 1e-6, speed, 4e-7, 0.9, 1e-6)) for rank, speed in speeds.items()]
    assert doctor._tell(seen, measured) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-4:] == ["a: well", "b: well", "c: network 2.00 GB/s, elsewhere 10.00", "d: well"]
    assert "network   2 us, 2.00 GB/s, ranks 0 and 2 of a and c" in said
    write_links(tmp_path / "links.json", by_level(measured), "cuda", list("aabcd"))
    told = json.loads((tmp_path / "links.json").read_text())
    assert told["links"] == {"network": {"latency": 2e-6, "bandwidth": 10e9, "hop": 4e-7, "share": 0.9, "gap": 1e-6}}
    assert (told["device"], told["hosts"]) == ("cuda", ["a", "b", "c", "d"])
    assert {"torch", "date"} <= told.keys()
    assert Wires.read(tmp_path / "links.json") == Wires(*[Wire(2e-6, 10e9, 4e-7, 0.9, 1e-6)] * 2)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(node, "SIZE", 1 << 20)


def test_one_machine_alone(capsys, small, tmp_path):
    code = main(["--folder", str(tmp_path)])
    said = capsys.readouterr().out
    host = socket.gethostname()
    verdict = said.splitlines()[-1]
    assert said.startswith(f"{host}, 1 rank\n")
    assert verdict.startswith(f"{host}: ")
    assert code == (verdict != f"{host}: well")
    for fact in ("python", "torch", "cuda", "nccl", "triton", "devices", "clock", "disk", "ports"):
        assert f"\n  {fact:8}" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "0"], "--ranks must be at least 1, got 0"),
        (["--ranks", "two"], "argument --ranks"),
        (["--rank", "2"], "--rank"),
        (["--folder", "/nowhere/at/all"], "--folder '/nowhere/at/all' is no folder"),
        (
            ["--probe", "/nowhere/at/all.json"],
            "--probe '/nowhere/at/all.json' cannot be written: No such file or directory",
        ),
        (["--probe", "links.json"], "--ranks 2"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, arguments, said):
    assert main(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("lasp: error: ")
    assert line.count("\n") == 1
    assert said in line


@pytest.mark.timeout(120)
def test_two_ranks_measure_their_link(capfd, tmp_path):
    file = tmp_path / "links.json"
    main(["--ranks", "2", "--probe", str(file), "--folder", str(tmp_path)])
    told = capfd.readouterr()
    assert not told.err
    assert "\nnode      " in told.out
    assert told.out.startswith(f"{socket.gethostname()}, 2 ranks\n")
    link = json.loads(file.read_text())["links"]["node"]
    assert 1e-7 < link["latency"] < 0.1
    assert 1e6 < link["bandwidth"] < 1e12
    assert 0 < link["hop"] < 0.1
    assert 0 < link["share"] <= 1
    assert 0 < link["gap"] < 0.1
    assert Wires.read(file).node == Wire(**link), "what the cost model reads"


def look(ranks: int, monkeypatch, connects) -> list[str]:
    """What `reach` says to ranks that are threads here, each with a machine of its own."""
    monkeypatch.setattr(links, "_connects", connects)
    store, said = dist.HashStore(), []

    def rank(place: int) -> None:
        try:
            reach(Place(place, ranks, 0, 1, "127.0.0.1", 29500), store)
        except ValueError as error:
            said.append(str(error))

    threads = [threading.Thread(target=rank, args=(place,)) for place in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_ranks_reach_each_other_or_all_are_told_who_does_not(monkeypatch):
    assert look(3, monkeypatch, links._connects) == []
    said = look(3, monkeypatch, lambda *_: False)
    assert len(said) == 3
    assert len(set(said)) == 1
    assert said[0].startswith(f"rank 0 ({socket.gethostname()}, ")
    assert "does not reach rank 0" in said[0]
    assert said[0].endswith("; and 5 more")


def test_a_file_that_is_no_link_file_is_refused(tmp_path):
    for text in ('{"links": []}', '{"links": {}}', "[]"):
        Path(tmp_path / "links.json").write_text(text)
        with pytest.raises(ValueError, match=r"links.json' is no file of `lasp doctor --probe`"):
            Wires.read(tmp_path / "links.json")
