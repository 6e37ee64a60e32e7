"""Every example, as its first lines say it is run: the loss falls, and is the same on both ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.name: path for path in sorted((ROOT / "examples").glob("*.py"))}


LINES = {"dpo.py": 60, "finetune.py": 80}


def losses(name: str, ranks: int, folder: Path, arguments: tuple[str, ...] = ()) -> list[list[str]]:
    """What each rank says of its epochs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, EXAMPLES[name], *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return [re.findall(rf"rank {rank}, epoch \d+: loss (\d+\.\d+)", done.stdout) for rank in range(ranks)]


@pytest.mark.parametrize("name", EXAMPLES)
def test_is_short_and_says_how_it_is_run(name: str) -> None:
    text = EXAMPLES[name].read_text(encoding="utf-8")
    assert f"torchrun --nproc-per-node 2 examples/{name}" in text
    assert len(text.splitlines()) < LINES[name]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_preferences_have_the_same_curve_on_one_rank_and_two(tmp_path: Path) -> None:
    one, two = losses("dpo.py", 2, tmp_path)
    assert one == two
    assert float(one[-1]) < float(one[0]) - 0.5
    assert losses("dpo.py", 1, tmp_path) == [one]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_hybrid_is_fine_tuned_and_loads_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from lasp.train.data.tokenizer import ByteTokenizer
    from tests.hf_models import configuration

    config = configuration("qwen3_next")
    config.vocab_size = 300
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    ByteTokenizer().save(tmp_path / "model")
    rows = [json.dumps({"text": "To be, or not to be, that is the question. " * (1 + row % 3)}) for row in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    said = losses("finetune.py", 2, tmp_path, ("model", "data.jsonl", "--tokens", "512", "--lr", "1e-2"))
    assert said[0] == said[1]
    assert float(said[0][-1]) < float(said[0][0]) - 0.5
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "finetuned")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "finetuned")
    ids = tokenizer(json.loads(rows[0])["text"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() < float(said[0][-1]) + 0.2
