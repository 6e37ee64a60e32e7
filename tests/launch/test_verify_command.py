"""`lasp verify`: exit codes, and what is refused before ranks start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lasp.launch import verify
from lasp.launch.cases import cases

pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A model's folder with a configuration and no weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 500, **sizes}))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bloom"], ["BloomAttention", "not verified", "docs/models.md"]),
        (["no such model"], ["no such model", "no model type", "owner/name"]),
        (["qwen3_nxt"], ["no model type", "did you mean qwen3_next"]),
        (["lama"], ["no model type", "did you mean llama"]),
        (["Mixtral"], ["no model type", "did you mean mixtral or"]),
        (["{folder}/nothing"], ["nothing", "no valid configuration"]),
        (["gemma4_assistant"], ["gemma4_assistant", "no valid configuration"]),  # its defaults do not fit together
        (["t5"], ["cannot make a tiny t5", "T5Config"]),
        (["xlm"], ["cannot make a tiny xlm", "lasp.verify"]),
        (["llama", "--sp", "0"], ["--sp", "got 0"]),
        (["llama", "--sp", "8", "--seq-len", "7"], ["--seq-len", "8 and 7"]),
        (["llama", "--sp", "2", "--simulate", "4"], ["--simulate 4 plays its ranks in one process", "--sp 2"]),
        (["--simulate", "65"], ["--simulate must be from 2 to 64, got 65"]),
        (["--simulate", "8", "--seq-len", "7"], ["--seq-len at least --simulate, got 8 and 7"]),
        (["no such model", "--simulate", "4"], ["no such model", "no model type"]),
        ([], ["verify needs a model, or --simulate N"]),
    ],
)
def test_what_is_refused_starts_no_ranks(folder, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(verify, "run_ranks", lambda *_: pytest.fail("ranks started"))
    assert verify.main([argument.format(folder=folder) for argument in arguments]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("lasp: error: ")
    assert stderr.count("\n") == 1
    assert all(part in stderr for part in said), stderr
    assert len(stderr) < 600, "not the names of all classes of transformers"


@pytest.mark.parametrize("name", ["qwen3_nxt", "gpt-neo", "nothing"])
def test_a_mistyped_type_asks_nobody(name, monkeypatch):
    """Only what can be an id of the hub, with its owner, is asked for there."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "_build_hf_headers", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    with pytest.raises(ValueError, match=f"'{name}': no model type of transformers, and no folder"):
        verify.configuration(name)


def test_an_sp_that_is_no_number_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as caught:
        verify.main(["llama", "--sp", "two"])
    assert caught.value.code == 2
    assert "--sp" in capsys.readouterr().err


def test_what_is_not_parallel_has_exit_code_1(capsys, monkeypatch):
    wrong = verify.Report(0.5, 0.5, {"model.layers.0.self_attn": 0.5}, {})
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(verify, "compare", lambda *_: wrong)
    assert verify.main(["llama", "--sp", "1"]) == 1
    assert "not parallel: first model.layers.0.self_attn, by 5.0e-01" in capsys.readouterr().out


@pytest.mark.timeout(120)
def test_what_is_exact_has_exit_code_0_and_is_told_once(folder, capfd):
    assert verify.main([folder, "--sp", "2", "--seq-len", "16"]) == 0
    told = capfd.readouterr()
    assert told.out.startswith("parallel and exact: ")
    assert told.out.count("\n") == 1
    assert not told.err


def test_simulated_ranks_of_a_model(folder, capsys):
    assert verify.main([folder, "--simulate", "4", "--seq-len", "16"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("parallel and exact: ")
    assert told.count("\n") == 1


def few(names: tuple[str, ...]):
    return lambda *given: [case for case in cases(*given) if case.name in names]


def test_simulated_ranks_of_operations_and_mixers(capsys, monkeypatch):
    """A line for each, and exit code 1 where one is off: here a layer that does not know of its ranks."""
    names = ("delta_rule, decay per token, scan two_level", "softmax_attention, method ulysses", "mixer mamba2")
    monkeypatch.setattr(verify, "cases", few(names))
    assert verify.main(["--simulate", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": parallel and exact: relative differences of output ")[0] for line in lines] == [*names]
    monkeypatch.setattr(verify, "cases", few(("mixer mamba2",)))
    monkeypatch.setattr("lasp.launch.cases._Layer.forward", lambda layer, cut, x: layer.mixer(x)[0])
    assert verify.main(["--simulate", "2"]) == 1
    assert capsys.readouterr().out.startswith("mixer mamba2: not parallel: relative differences of output ")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_64_simulated_ranks(capsys):
    assert verify.main(["--simulate", "64"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) > 40
    assert all(": parallel and exact: " in line for line in told)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ranks_of_torchrun_are_refused_once():
    """As under Slurm, where no process stands before the ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "lasp.launch.verify", "bloom", "--sp", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert len([line for line in done.stderr.splitlines() if line.startswith("lasp: error:")]) == 1, done.stderr
