"""`lasp train`: configuration files and overrides, one-line errors, and the ranks it starts."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lasp.launch import cli
from lasp.launch.train import RECIPES, main, read_config
from lasp.train.metrics import read_metrics

TINY = """
output = "{folder}/run"
steps = 4
device = "cpu"
dtype = "float64"

[model]
num_hidden_layers = 2
hidden_size = 32
intermediate_size = 64
num_attention_heads = 2

[data]
source = "{folder}/text.txt"
seq_len = 65

[sample]
prompt = "To be"
tokens = 5
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 40)
    (tmp_path / "tiny.toml").write_text(TINY.format(folder=tmp_path))
    return str(tmp_path / "tiny.toml")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=55)


def error_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("lasp: error:")]


def test_overrides_win_over_the_file(recipe):
    config = read_config([recipe, "--sp", "4", "--optimizer.lr=0.5", "--model.hidden_size", "64", "--resume", "latest"])
    assert (config.sp, config.optimizer.lr, config.resume, config.steps) == (4, 0.5, "latest", 4)
    assert (config.model["hidden_size"], config.model["num_hidden_layers"], config.data.seq_len) == (64, 2, 65)


def test_every_recipe_is_a_configuration_known_by_its_name():
    names = [path.stem for path in RECIPES.glob("*.toml")]
    assert "demo" in names
    assert all(read_config([name]).output == f"runs/{name}" for name in names)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.toml"], ["nowhere.toml", "demo"]),
        (["{recipe}", "--stepz", "3"], ["stepz"]),
        (["{recipe}", "--data.sequence", "3"], ["data.sequence"]),
        (["{recipe}", "--config", "{folder}/unknown.toml"], ["optimizer", "beta"]),
        (["{recipe}", "--config", "{folder}/broken.toml"], ["line 1"]),
        (["{recipe}", "--steps", "many"], ["steps", "many"]),
        (["{recipe}", "--layout", "spiral"], ["layout", "spiral", "zigzag"]),
        (["{recipe}", "--sp", "66"], ["65", "66"]),
        (["{recipe}", "--model.num_attention_heads", "5"], ["32", "5"]),
        (["{recipe}", "--model.heads", "5"], ["heads"]),
        (["{recipe}", "--data.source", "{folder}/missing.txt"], ["missing.txt", "No such file"]),
        (["{recipe}", "--data.seq_len", "9999"], ["1721 tokens", "9999"]),
        (["{recipe}", "--output", "{folder}/text.txt"], ["text.txt", "Not a directory"]),
        (["{recipe}", "--data.tokenizer", "{folder}/text.txt"], ["text.txt"]),
        (["{recipe}", "--resume", "{folder}/step-000001"], ["step-000001"]),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(recipe, tmp_path, capsys, arguments, said):
    (tmp_path / "unknown.toml").write_text("[optimizer]\nbeta = 3\n")
    (tmp_path / "broken.toml").write_text("a = = 3\n")
    assert main([argument.format(recipe=recipe, folder=tmp_path) for argument in arguments]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("lasp: error: ")
    assert stderr.count("\n") == 1
    assert all(part in stderr for part in said), stderr


def test_a_checkpoint_of_another_model_is_refused_before_ranks_start(recipe, tmp_path, capsys):
    assert main([recipe]) == 0
    checkpoint = f"{tmp_path}/run/checkpoints/step-000004"
    capsys.readouterr()
    arguments = [recipe, "--sp=2", "--steps=8", "--resume", checkpoint, "--model.intermediate_size=96"]
    assert main(arguments) == 2
    stderr = capsys.readouterr().err
    assert "intermediate_size is 64 there and 96 here" in stderr
    assert stderr.count("\n") == 1


def test_the_command_starts_ranks_whose_losses_are_those_of_one_process(recipe, tmp_path, capsys):
    assert main([recipe, "--output", f"{tmp_path}/alone"]) == 0
    done = run("-m", "lasp.launch.cli", "train", recipe, "--sp", "2")
    assert done.returncode == 0, done.stderr
    alone, together = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("alone", "run"))
    assert [m.loss for m in together] == pytest.approx([m.loss for m in alone], rel=1e-9)
    assert [m.grad_norm for m in together] == pytest.approx([m.grad_norm for m in alone], rel=1e-9)
    for result in ("metrics.jsonl", "loss.png", "checkpoints/step-000004"):
        assert f"{tmp_path}/run/{result}" in done.stdout
        assert (tmp_path / "run" / result).exists()
    assert done.stdout.count("The model continues 'To be'") == 1
    assert not error_lines(done.stderr)


def test_ranks_of_torchrun_report_a_user_error_once(recipe):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lasp.launch.train")
    done = run(*torchrun, recipe, "--sp", "3")
    assert done.returncode != 0
    assert len(error_lines(done.stderr)) == 1, done.stderr


def test_lasp_knows_its_subcommands(capsys, monkeypatch):
    assert cli.main([]) == 0
    usage = capsys.readouterr().out
    assert all(name in usage for name in cli.COMMANDS)
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == "lasp: error: unknown command 'trian'; choose from train, verify, tune, bench\n"
    monkeypatch.setitem(cli.COMMANDS, "echo", cli.Command("lasp.launch.train", "for this test"))
    assert cli.main(["echo", "nowhere.toml"]) == 2


def test_a_mistake_of_one_rank_ends_all_and_is_told_by_the_first(recipe):
    """Two ranks started by hand, as under Slurm; only the second is given an unknown key."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank, extra in enumerate(([], ["--stepz", "3"])):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "lasp.launch.train", str(recipe), "--sp", "2", *extra]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    told = [rank.communicate(timeout=50)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "stepz" in told[0]
    assert "(rank 1 of 2)" in told[0]
