"""`lasp linearize`: from a folder to a folder, over ranks, and going on where it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lasp.launch import cli
from lasp.launch.linearize_report import Report
from lasp.train import transfer

ARGUMENTS = [
    "--data", "{folder}/texts.jsonl", "--tokenizer", "bytes", "--seq-len", "64", "--held-out", "0.2", "--window", "8",
    "--device", "cpu", "--output", "{folder}/out",
]  # fmt: skip


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = [{"text": f"{i}: To be, or not to be, that is the question." * 2} for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    return ["linearize", str(folder / "model"), *(word.format(folder=folder) for word in ARGUMENTS), *more]


def save(family: str, folder: Path) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder / "model")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("family", "method"), [("Llama", "lolcats"), ("Qwen3", "lolcats"), ("Qwen3", "liger")])
def test_from_a_folder_to_a_folder(family: str, method: str, folder: Path) -> None:
    save(family, folder)
    options = ("--method", method, "--transfer-steps", "12", "--steps", "4", "--rank", "2", "--lr", "1e-2", "--sp", "2")
    command = ["-m", "lasp", *arguments(folder, *options, "--save-every", "2")]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["trained"] < report["converted"]
    if method == "lolcats":
        assert all(report["errors after"][layer] < error for layer, error in report["errors before"].items())
    assert (folder / "out" / "report.png").stat().st_size > 0

    # Once more from the middle of each stage: the same figures.
    (folder / "out" / "report.json").unlink()
    steps = sorted((folder / "out" / "adapters" / "checkpoints").glob("step-*"))
    for path in (*steps[1:], folder / "out" / "model"):
        shutil.rmtree(path)
    assert run(*command).returncode == 0
    again = json.loads((folder / "out" / "report.json").read_text())
    assert again["transferred"] == report["transferred"]
    assert again["trained"] == pytest.approx(report["trained"], abs=1e-6)

    code = (
        "import torch, lasp, sys; model = lasp.linearize(sys.argv[1])\n"
        "print(model.generate(torch.tensor([[84, 111]]), max_new_tokens=5, eos_token_id=None).shape)"
    )
    said = run("-c", code, str(folder / "out" / "model"))
    assert "[1, 7]" in said.stdout, said.stderr


def test_what_it_refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, told in (
        (("--method", "lolcat"), "invalid choice: 'lolcat'"),
        (("--method", "liger", "--held-out", "0"), "--held-out must lie between 0 and 1"),
        (("--method", "liger", "--rank", "0"), "--rank must be at least 1"),
        (("--method", "liger"), "cannot be read"),
    ):
        assert cli.main(arguments(folder, *more)) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"asked": 5}', "[" * 9999, None])
def test_a_report_that_is_none_is_named(folder: Path, content: str | None) -> None:
    path = folder / "report.json"
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=r"^cannot read '.*report\.json' of the linearisation: .*another output$"):
        Report.open(folder, {"method": "liger"})


def test_the_state_of_a_transfer_that_cannot_be_read_is_named(folder: Path) -> None:
    path, weight = folder / "transfer.pt", torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.AdamW([weight])
    weight.sum().backward()
    adam.step()
    transfer._save(path, {"weight": weight}, adam, 7)
    assert transfer._load(path, {"weight": weight}, adam) == 7
    whole = path.read_bytes()
    for damaged, trained in ((whole[:100], "weight"), (b"", "weight"), (whole, "another")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^cannot go on from '.*transfer\.pt': ."):
            transfer._load(path, {trained: weight}, adam)
