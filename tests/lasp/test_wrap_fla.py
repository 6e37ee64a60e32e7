"""Where flash-linear-attention is installed: without a GPU, and its own layers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
# As the library does without a GPU: some of it raises when it is imported, the rest when it is called.
STUB = {
    "fla/__init__.py": "",
    "fla/ops/__init__.py": "",
    "fla/ops/kda.py": "raise RuntimeError('0 active drivers')",
    "fla/ops/gated_delta_rule.py": """
def chunk_gated_delta_rule(query, key, value, g, beta, **_):
    raise RuntimeError("0 active drivers")
""",
}
SCRIPT = """
import copy, torch
import lasp
from tests.hf_models import make_single

for name in ("qwen3_5", "kimi_linear"):
    model = make_single(name)
    try:
        model(torch.arange(20).view(1, 20))
        print(name, "runs alone")
    except RuntimeError as error:
        print(name, error)
    print(name, lasp.verify(model, None).exact)
    batch = lasp.shard_batch({"input_ids": torch.arange(20).view(1, 20)}, None)
    print(name, lasp.parallelize(model, None)(**batch).logits.isfinite().all().item())
"""


def test_without_a_gpu_the_torch_code_runs(tmp_path: Path) -> None:
    for name, text in STUB.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stderr
    told = ["0 active drivers", "True", "True"], ["runs alone", "True", "True"]
    assert done.stdout.splitlines() == [f"qwen3_5 {x}" for x in told[0]] + [f"kimi_linear {x}" for x in told[1]]
