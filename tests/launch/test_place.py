"""Ranks that torchrun, srun and mpirun start: their variables, where they meet, and one run of them."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from lasp.launch import place
from lasp.launch.attempt import own_store
from lasp.launch.lock import locked
from lasp.launch.outcome import Failure, Outcome
from lasp.launch.place import Place, hosts
from lasp.launch.train import main
from lasp.train.metrics import read_metrics

SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-8753@1",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
TORCH = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu08", "MASTER_PORT": "29500"}


def without(told: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in told.items() if name not in names}


@pytest.mark.parametrize(
    ("told", "local", "address"),
    [
        (TORCH, (None, None), "gpu08"),
        ({**TORCH, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (1, 2), "gpu08"),
        ({**TORCH, **MPIRUN}, (None, None), "gpu08"),  # whoever set torch's variables knew better
        (SRUN, (1, 2), "gpu08"),
        ({**SRUN, "SLURM_STEP_NODELIST": "gpu08"}, (1, 4), "127.0.0.1"),
        ({**without(SRUN, "SLURM_STEP_NODELIST"), "SLURM_JOB_NODELIST": "b,a[1-2]"}, (1, 2), "b"),
        (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"), (1, None), "10.0.0.1"),
        ({**SRUN, "MASTER_ADDR": "10.1.2.3"}, (1, 2), "10.1.2.3"),
        ({**MPIRUN, "MASTER_ADDR": "gpu08"}, (1, 2), "gpu08"),
        ({**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, (1, 4), "127.0.0.1"),
        ({**MPIRUN, "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "gpu[08-09]"}, (1, 2), "gpu08"),
        (HYDRA, (3, 4), "127.0.0.1"),
    ],
)
def test_a_place_is_read_from_each_launcher(told, local, address):
    found = Place.read(told)
    assert found is not None
    assert (found.rank, found.size, found.local_rank, found.local_size, found.address) == (3, 4, *local, address)
    assert found.elastic == ("TORCHELASTIC_RUN_ID" in told)
    assert ("GLOO_SOCKET_IFNAME" in found.variables) == (address == "127.0.0.1")


def test_ranks_of_one_job_agree_on_a_port_and_jobs_do_not():
    first, second, another, later = (
        Place.read({**SRUN, **more})
        for more in ({}, {"SLURM_PROCID": "0"}, {"SLURM_JOB_ID": "78"}, {"SLURM_STEP_ID": "1"})
    )
    assert first.port == second.port
    assert len({first.port, another.port, later.port}) == 3
    assert all(20_000 <= found.port < 32_000 for found in (first, another, later))
    assert Place.read({**SRUN, "MASTER_PORT": "1234"}).port == 1234
    assert Place.read(HYDRA).port == 20_000  # MPICH does not name its jobs


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"WORLD_SIZE": "3"},
        {**SRUN, "SLURM_NTASKS": "1"},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},  # of a larger job
        without(SRUN, "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_LAUNCH_NODE_IPADDR"),  # a batch script
        {**MPIRUN, "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_a_process_on_its_own_has_no_place(told):
    assert Place.read(told) is None


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"RANK": "3"}, "RANK='3' is set, but WORLD_SIZE not"),
        ({**TORCH, "RANK": "x"}, "RANK='x' in the environment is no number"),
        ({**TORCH, "RANK": "4"}, "rank 4 of 4 ranks"),
        ({**TORCH, "RANK": "0", "WORLD_SIZE": "0"}, "rank 0 of 0 ranks"),
        (without(TORCH, "MASTER_ADDR"), "MASTER_ADDR not: where"),
        ({**TORCH, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        (MPIRUN, "mpirun -x MASTER_ADDR=first-host"),
        (without(MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE"), "lacks OMPI_COMM_WORLD_LOCAL_SIZE"),
        (without(SRUN, "SLURM_LOCALID"), "lacks SLURM_LOCALID"),
        (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_LAUNCH_NODE_IPADDR"), "set MASTER_ADDR"),
        ({**SRUN, "SLURM_STEP_NODELIST": "gpu[a-b]"}, r"\[a-b\]"),
    ],
)
def test_an_environment_that_says_too_little_is_refused(told, said):
    with pytest.raises(ValueError, match=said):
        Place.read(told)


def test_an_interface_that_is_not_there_is_named():
    """gloo's own error for it looks like that of a lost rank."""
    with pytest.raises(ValueError, match=r"GLOO_SOCKET_IFNAME: this machine has no interface 'nope0', but .*lo"):
        place._check_interface("nope0")
    place._check_interface("lo")
    place._check_interface(None)


def test_a_name_without_an_address_is_waited_for_and_told(monkeypatch, capsys):
    answers = [socket.gaierror(-2, "Name or service not known")] * 2

    def look_up(*_: object) -> None:
        if answers:
            raise answers.pop()

    monkeypatch.setattr(place.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(place.time, "sleep", lambda _: None)
    place._resolve("first")
    assert capsys.readouterr().err == "lasp: waiting for MASTER_ADDR='first', which has no address here yet\n"
    answers.append(socket.gaierror(-2, "Name or service not known"))
    with pytest.raises(ValueError, match=r"MASTER_ADDR='first' has no address here: .*not known"):
        place._resolve("first", seconds=-1)


def test_lists_of_nodes():
    assert hosts("a") == ["a"]
    assert hosts("gpu[01-03,7],login") == ["gpu01", "gpu02", "gpu03", "gpu7", "login"]
    assert hosts("r[1-2]n[09-10]-ib") == ["r1n09-ib", "r1n10-ib", "r2n09-ib", "r2n10-ib"]
    assert hosts("") == []


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_who_is_missing_is_named(port, monkeypatch):
    monkeypatch.setattr(place, "JOIN", 1.0)
    told, second = [], Place(1, 4, 1, 4, "127.0.0.1", port)

    def come() -> None:
        try:
            second._meet()
        except Failure as error:
            told.append(str(error))

    thread = threading.Thread(target=come)
    thread.start()
    with pytest.raises(ValueError, match=rf"of 4 ranks, 2, 3 did not come to 127.0.0.1:{port} in 1 s"):
        Place(0, 4, 0, 4, "127.0.0.1", port)._meet()
    thread.join()
    assert len(told) == 1
    assert told[0].startswith("waited at")


def test_a_port_that_is_taken_and_a_rank_0_that_never_comes_are_told(port, monkeypatch):
    monkeypatch.setattr(place, "JOIN", 1.0)
    with pytest.raises(Failure, match=f"there is no rank 0 at 127.0.0.1:{port}"):
        Place(1, 2, 1, 2, "127.0.0.1", port)._meet()
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        with pytest.raises(ValueError, match=f"cannot listen at 127.0.0.1:{port}, which MASTER_ADDR and MASTER_PORT"):
            Place(0, 2, 0, 2, "127.0.0.1", port)._meet()
    assert not dist.is_initialized()


def test_ranks_of_an_attempt_have_a_store_of_their_own_whatever_those_before_have_left():
    """As torchrun starts them: in one store, each at its own time."""
    shared = dist.HashStore()

    def rank(place: int, delay: float, found: dict) -> None:
        time.sleep(delay)
        found[place] = own_store(shared, place, 3, 20.0)

    for delays in ((0.0, 0.0, 0.0), (0.1, 0.0, 0.0), (0.0, 0.1, 0.05)):
        found: dict[int, dist.Store] = {}
        threads = [threading.Thread(target=rank, args=(place, delays[place], found)) for place in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not found[0].check(["here"])
        found[0].set("here", "yes")
        assert [bytes(found[place].get("here")) for place in range(3)] == [b"yes"] * 3


def test_a_rank_of_an_attempt_that_does_not_come_is_named():
    store = dist.HashStore()
    for rank, told in ((1, "1"), (0, "1, 2")):
        with pytest.raises(TimeoutError, match=f"^{told}$"):
            own_store(store, rank, 3, 0.05)


LASP = [sys.executable, "-m", "lasp.launch.cli"]


def plain() -> dict[str, str]:
    """This environment, without what a launcher of the tests may have said."""
    launchers = ("OMPI_COMM", "PMI", "SLURM_", "RANK", "WORLD_SIZE", "MASTER_", "LOCAL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    return kept | {"OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(not Path(sys.executable).with_name("mpirun").exists(), reason="Open MPI is not here")
def test_two_ranks_of_mpirun_are_one_run(recipe, tmp_path):
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [str(Path(sys.executable).with_name("mpirun")), "--oversubscribe", "-n", "2", *LASP, "train", recipe]
    done = subprocess.run(
        [*command, "--sp", "2"], env=plain() | root, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("last loss") == 1
    assert [step.step for step in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_a_folder_in_use_is_refused_before_anything_is_prepared(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "environ", plain())
    with locked(tmp_path / "run"):
        assert main([recipe, "--sp", "2"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"lasp: error: {str(tmp_path / 'run')!r} is in use by process {os.getpid()} on ")
    assert told.count("\n") == 1
    assert os.listdir(tmp_path / "run") == [".lock"]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_tasks_of_srun_are_one_run_which_a_second_run_may_not_join(recipe, tmp_path):
    """Started as srun starts them; the first finds the folder locked, and both say so with one voice."""
    common = plain() | SRUN | {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "nowhere", "SLURM_NODEID": "0"}
    common["SLURM_JOB_ID"] = str(os.getpid())  # decides the port

    def tasks() -> list[tuple[int, str, str]]:
        environments = [common | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
        ranks = [
            subprocess.Popen(
                [*LASP, "train", recipe, "--sp", "2"],
                env=told,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for told in environments
        ]
        said = [rank.communicate(timeout=100) for rank in ranks]
        return [(rank.returncode, *words) for rank, words in zip(ranks, said, strict=True)]

    with locked(tmp_path / "run"):
        first, second = tasks()
    assert (first[0], second[0]) == (2, 2)
    assert f"{str(tmp_path / 'run')!r} is in use by process {os.getpid()} on {socket.gethostname()}" in first[2]
    assert first[2].count("lasp: error:") == 1
    assert not second[2]
    first, second = tasks()
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert first[1].count("last loss") == 1
    assert not second[1]


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (Outcome(2, "no such file", alike=True), ["no such file", ""]),
        (Outcome(1, "the cause"), ["rank 0: the cause", "rank 1: the cause"]),
        (
            Outcome(1, "closed", "Traceback\n", lost_peer=True),
            [f"rank {rank} lost another one, which says why unless it was killed: closed" for rank in range(2)],
        ),
    ],
)
def test_a_rank_of_others_tells_its_error_in_one_line_and_ends(capsys, monkeypatch, outcome, told):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    for rank in range(2):
        outcome.tell_as(rank, speaks=rank == 0)
        assert capsys.readouterr().err == (f"lasp: error: {told[rank]}\n" if told[rank] else "")
    assert ended == [outcome.code] * 2
