"""`lasp launch`: what each launcher is given, to the letter, and batch files that run under a stub of Slurm."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lasp.launch import address, torchrun
from lasp.launch.launch import main
from lasp.launch.network import lacking, network
from lasp.launch.place import Place
from lasp.train.metrics import read_metrics

GOLDEN = Path(__file__).with_name("golden")
STUB = Path(__file__).with_name("stub")
CONFIG = "output = 'runs/long'\nsp = 4\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch) -> Path:
    """A folder to work in, with a configuration for four ranks; Python has the same name everywhere."""
    (tmp_path / "long.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    return tmp_path


def told(capsys, *arguments: str, code: int = 0) -> str:
    assert main(list(arguments)) == code
    said = capsys.readouterr()
    assert not (said.err if code == 0 else said.out)
    return said.out if code == 0 else said.err


@pytest.mark.skipif(sys.platform != "linux", reason="the loopback has another name")
def test_torchrun_on_one_machine(capsys):
    assert told(capsys, "torchrun", "long.toml", "--steps=9", "--dry-run") == (
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo /venv/bin/python -m "
        "torch.distributed.run --nnodes 1 --nproc-per-node 4 --max-restarts 3 --standalone --local-addr 127.0.0.1 "
        "-m lasp.launch.train long.toml --steps=9 --resume latest\n"
    )


def test_who_starts_torchrun_on_one_machine_is_told_what_is_exposed(capsys, monkeypatch):
    monkeypatch.setattr(os, "execvpe", lambda *_: None)
    monkeypatch.setattr(torchrun, "own_address", lambda _: "10.99.7.1")
    main(["torchrun", "long.toml"])
    assert re.fullmatch(r"lasp: warning: torchrun's store listens on every interface .*\n", capsys.readouterr().err)
    main(["torchrun", "long.toml", "--nodes", "2", "--endpoint", "10.99.7.7:29500"])
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("host", "is_host"), [("127.0.0.1", 1), ("10.99.7.7", 0)])
def test_torchrun_as_one_node_of_two(capsys, monkeypatch, host, is_host):
    monkeypatch.setattr(torchrun, "own_address", lambda _: "10.99.7.1")
    monkeypatch.setattr(torchrun, "interface_of", lambda _: "ib0")
    endpoint = f"{host}:29400"
    arguments = ["long.toml", "--nodes", "2", "--endpoint", endpoint, "--restarts", "0", "--dry-run"]
    assert told(capsys, "torchrun", *arguments) == (
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 GLOO_SOCKET_IFNAME=ib0 /venv/bin/python -m lasp.launch.agent "
        f"--nnodes 2 --nproc-per-node 2 --max-restarts 0 --rdzv-endpoint {endpoint} --rdzv-id long --rdzv-conf "
        f"is_host={is_host},join_timeout=600,again_timeout=45 --local-addr 10.99.7.1 -m lasp.launch.train long.toml\n"
    )


def test_torchrun_with_fewer_nodes_when_others_are_lost(capsys, monkeypatch):
    monkeypatch.setattr(torchrun, "own_address", lambda _: "10.99.7.1")
    monkeypatch.setattr(torchrun, "interface_of", lambda _: None)
    arguments = ["long.toml", "--nodes", "2", "--gpus", "4", "--least-nodes", "1", "--wait", "60"]
    said = told(capsys, "torchrun", *arguments, "--endpoint", "127.0.0.1:29400", "--dry-run")
    assert " --nnodes 1:2 --nproc-per-node 4 " in said
    assert " --rdzv-conf is_host=1,join_timeout=60,again_timeout=45,last_call_timeout=5,keep_alive_interval=3 " in said
    assert said.endswith(" long.toml --elastic true --dp 2 --resume latest\n")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the interface")
def test_the_network_of_a_node_is_the_one_that_leads_to_the_others():
    assert address.own_address("127.0.0.1") == "127.0.0.1"
    assert address.interface_of("127.0.0.1") == "lo"
    assert address.interface_of("192.0.2.1") is None
    assert not address.is_here("192.0.2.1")


SLURM = [
    "--nodes",
    "2",
    "--gpus",
    "2",
    "--cpus",
    "6",
    "--time",
    "2:00:00",
    "--partition",
    "long",
    "--setup",
    "module load cuda",
]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("two_nodes.sbatch", ["slurm", "long.toml", *SLURM, "--data.source", "my text.txt"]),
        ("one_node.sbatch", ["slurm", "long.toml", "--device", "cpu", "--attempts", "1", "--resume", "latest"]),
        (
            "two_hosts.deepspeed",
            ["deepspeed", "long.toml", "--nodes", "2", "--hosts", "first,second", "--engine", "zero1"],
        ),
        ("one_host.deepspeed", ["deepspeed", "long.toml", "--port", "29501"]),
    ],
)
def test_files_and_commands_are_the_golden_ones(capsys, folder, name, arguments):
    said = told(capsys, *arguments, "--dry-run")
    assert said == (GOLDEN / name).read_text()
    assert os.listdir(folder) == ["long.toml"]


def test_the_batch_file_of_the_documentation_is_a_real_one():
    written = (GOLDEN / "two_nodes.sbatch").read_text().split("\n", 1)[1].partition("\n# submit it")[0]
    assert f"```bash\n{written.rstrip()}\n```" in (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lsf", "long.toml"], "unknown launcher 'lsf'; choose from torchrun, slurm, deepspeed"),
        (["torchrun"], "CONFIG is missing"),
        (["torchrun", "none.toml"], "none.toml"),
        (["torchrun", "long.toml", "--nodes", "x"], "argument --nodes"),
        (["torchrun", "long.toml", "--nodes", "0"], "--nodes and --gpus must be at least 1"),
        (["torchrun", "long.toml", "--nodes", "3"], "4 ranks, which 3 nodes cannot share"),
        (["torchrun", "long.toml", "--gpus", "6"], "1 nodes x 6 gpus = 6 ranks, but the configuration has sp = 4"),
        (["torchrun", "long.toml", "--gpus", "8", "--dp", "1"], "8 ranks, but the configuration has sp = 4 and dp = 1"),
        (["torchrun", "long.toml", "--restarts", "-1"], "--restarts must not be negative"),
        (["torchrun", "long.toml", "--endpoint", "a:1"], "--nodes is 1"),
        (["torchrun", "long.toml", "--nodes", "2"], "--endpoint HOST:PORT"),
        (["torchrun", "long.toml", "--nodes", "2", "--endpoint", "first"], "--endpoint HOST:PORT"),
        (["torchrun", "long.toml", "--nodes", "2", "--endpoint", "no-such-host.invalid:29500"], "has no address here"),
        (["torchrun", "long.toml", "--least-nodes", "1"], "--nodes is 1"),
        (["torchrun", "long.toml", "--wait", "60"], "--nodes is 1"),
        (["torchrun", "long.toml", "--nodes", "2", "--least-nodes", "3"], "--least-nodes must lie in 1..2"),
        (["torchrun", "long.toml", "--nodes", "4", "--gpus", "2", "--least-nodes", "2"], "with 3 of 4 nodes"),
        (["torchrun", "long.toml", "--wait-again", "60"], "--nodes is 1"),
        (["torchrun", "long.toml", "--nodes", "2", "--endpoint", "a:1", "--wait", "0"], "at least 1, got 0 and 45"),
        (["torchrun", "long.toml", "--nodes", "2", "--endpoint", "a:1", "--wait-again", "0"], "got 600 and 0"),
        (
            ["torchrun", "long.toml", "--nodes=2", "--gpus=4", "--endpoint=a:1", "--least-nodes=1", "--wait-again=14"],
            "--wait-again 14 ends a job before it can go on with fewer nodes",
        ),
        (["torchrun", "long.toml", "--overwrite", "true"], "add --overwrite false"),
        (["torchrun", "long.toml", "--resume", "runs/step-000001"], 'resume = "latest" takes the newest'),
        (["torchrun", "long.toml", "--time_limit", "60"], "and would start them again; add --restarts 0"),
        (["slurm", "long.toml", "--overwrite=true"], "add --overwrite false"),
        (["slurm", "long.toml", "--time", "soon"], "--time must be"),
        (["slurm", "long.toml", "--notice", "0"], "--notice must be at least 1"),
        (["slurm", "long.toml", "--time", "5"], "--time 5 is over 300 s after its begin, and ranks are told 300 s"),
        (["slurm", "long.toml", "--time", "4:59"], "--time 4:59 is over 299 s after its begin"),
        (["slurm", "long.toml", "--time", "1-1:1:1", "--notice", "90061"], "--time 1-1:1:1 is over 90061 s"),
        (["slurm", "long.toml", "--time", "0-1", "--notice", "3600"], "--time 0-1 is over 3600 s"),
        (["slurm", "long.toml", "--attempts", "0"], "--attempts must be at least 1"),
        (["slurm", "long.toml", "--account", "a b"], "cannot hold --account='a b'"),
        (["slurm", "long.toml", "--partition", "a\n#SBATCH --uid=0"], "cannot hold --partition"),
        (["slurm", "long.toml", "--output", "my runs/a"], "cannot hold --output='my runs/a'"),
        (["slurm", "long.toml", "--submit"], "there is no 'sbatch' here"),
        (["deepspeed", "long.toml", "--nodes", "2"], "--hosts must name 2 different hosts"),
        (["deepspeed", "long.toml", "--nodes", "2", "--hosts", "a,a"], "--hosts must name 2 different hosts"),
        (["deepspeed", "long.toml", "--hosts=-oProxyCommand=x"], "is no host"),
        (["deepspeed", "long.toml", "--port", "0"], "--port 0 is no port"),
        *(
            (["deepspeed", "long.toml", "--nodes", "2", "--hosts", "a,b", "--data.source", word], repr(word))
            for word in ("my text.txt", "a;b", "$(touch x)", "%h", "")
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, monkeypatch, arguments, said):
    monkeypatch.setenv("PATH", "/nowhere")
    line = told(capsys, *arguments, code=2)
    assert line.startswith("lasp: error: ")
    assert line.count("\n") == 1
    assert said in line


RANK = """#!/bin/bash
# In the place of Python: notes its environment and arguments, and ends with the code that the test gave.
env > "$STUB_CALLS.rank$SLURM_PROCID"
printf '%s\\n' "$@" > "$STUB_CALLS.arguments"
exit "$STUB_CODE"
"""


@pytest.mark.parametrize(
    ("code", "calls"),
    [(0, "scancel --state=PENDING 7\n"), (2, "scancel --state=PENDING 7\n"), (75, "scontrol requeue 7_1\n"), (1, "")],
)
def test_a_batch_file_runs_its_ranks_and_says_how_it_goes_on(folder, monkeypatch, code, calls):
    python = folder / "my python"
    python.write_text(RANK)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    notes = folder / "calls"
    arguments = ["long.toml", "--nodes", "2", "--setup", "export SET_UP=yes", "--data.source", "it's $(touch x).txt"]
    assert main(["slurm", *arguments]) == 0
    environment = {
        **os.environ,
        "PATH": f"{STUB}:{os.environ['PATH']}",
        "STUB_CALLS": str(notes),
        "STUB_CODE": str(code),
    }
    done = subprocess.run(["sbatch", "runs/long/job.sbatch"], env=environment, check=False)
    assert done.returncode == code
    assert (notes.read_text() if notes.exists() else "") == calls
    said = notes.with_suffix(".arguments").read_text().splitlines()
    assert said == ["-m", "lasp.launch.train", "long.toml", "--data.source", arguments[-1], "--resume", "latest"]
    for rank in range(4):
        lines = notes.with_suffix(f".rank{rank}").read_text().splitlines()
        found = Place.read(dict(line.split("=", 1) for line in lines if re.match(r"(SLURM|SET)_", line)))
        assert (found.rank, found.size, found.local_rank, found.address) == (rank, 4, rank % 2, "gpu1")
        assert "SET_UP=yes" in lines
    assert not (folder / "x").exists()


TINY = """
output = "run"
steps = 3
device = "cpu"
sp = 2
[model]
num_hidden_layers = 1
hidden_size = 32
intermediate_size = 32
num_attention_heads = 2
[data]
source = "text.txt"
seq_len = 65
"""


@pytest.fixture
def real(folder, monkeypatch) -> dict[str, str]:
    """A tiny training that really runs; the environment for it."""
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    (folder / "text.txt").write_text("To be, or not to be, that is the question.\n" * 40)
    (folder / "tiny.toml").write_text(TINY)
    path = f"{STUB}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "STUB_CALLS": str(folder / "calls"), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "launcher",
    [["slurm", "--submit"], ["torchrun"], ["deepspeed", "--port", "29513"]],
    ids=lambda launcher: launcher[0],
)
def test_a_training_really_runs(folder, real, launcher):
    if launcher[0] == "deepspeed":
        pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "lasp.launch.cli", "launch", *launcher, "tiny.toml"]
    done = subprocess.run(command, env=real, capture_output=True, text=True, timeout=360, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("last loss") == 1
    assert [step.step for step in read_metrics(folder / "run" / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(lacking() is not None, reason="needs network namespaces")
def test_two_nodes_go_on_after_a_rank_is_killed(folder, real):
    """Two agents, each with one rank, in namespaces whose only way to each other is a network; no shared host name."""
    arguments = ["--nodes", "2", "--gpus", "1", "--steps", "300", "--save_every", "20"]
    command = [sys.executable, "-m", "lasp.launch.cli", "launch", "torchrun", "tiny.toml", *arguments]
    with network(2, 1e9) as net:
        nodes = [
            subprocess.Popen(
                [*net.command(place), *command, "--endpoint", "10.99.0.1:29500"],
                env=real, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for place in range(2)
        ]  # fmt: skip
        saved = folder / "run" / "checkpoints" / "step-000020"
        while not saved.exists() and all(node.poll() is None for node in nodes):
            time.sleep(0.1)
        [rank] = Path(f"/proc/{nodes[1].pid}/task/{nodes[1].pid}/children").read_text().split()
        os.kill(int(rank), signal.SIGKILL)
        said = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert [step.step for step in read_metrics(folder / "run" / "metrics.jsonl")] == list(range(1, 301))
