"""Where flash-linear-attention is installed: without a GPU, and its own layers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lasp

pytest.importorskip("transformers")

from tests.fla_stub import DeltaNet, GLAForCausalLM, Model, RetNetForCausalLM, make

IDS = torch.arange(20).view(1, 20)
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


@pytest.mark.slow
def test_without_a_gpu_the_torch_code_runs(tmp_path: Path) -> None:
    for name, text in STUB.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stderr
    told = ["0 active drivers", "True", "True"], ["runs alone", "True", "True"]
    assert done.stdout.splitlines() == [f"qwen3_5 {x}" for x in told[0]] + [f"kimi_linear {x}" for x in told[1]]


def refused(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lasp.parallelize(model, None)


def test_restored() -> None:
    model = make(GLAForCausalLM)
    before = model(IDS, labels=IDS)
    ours = lasp.parallelize(model, None)(**lasp.shard_batch({"input_ids": IDS, "labels": IDS}, None))
    torch.testing.assert_close((ours.loss, ours.logits), (before.loss, before.logits))
    assert torch.equal(lasp.unparallelize(model)(IDS, labels=IDS).loss, before.loss)


def test_layers_and_losses_that_are_not_known_are_refused() -> None:
    model = make(GLAForCausalLM)
    model.attn.shift = type("TokenShift", (torch.nn.Module,), {"__module__": "fla.modules.token_shift"})()
    refused(model, r"attn\.shift \(TokenShift\)")
    model = make(GLAForCausalLM)
    model.config.use_l2warp = True
    refused(model, "use_l2warp")
    other = type("GLAForSequenceClassification", (Model,), {"__module__": GLAForCausalLM.__module__, "layer": DeltaNet})
    refused(make(other), "only causal language models")
    other = type("HGRNForCausalLM", (Model,), {"__module__": "fla.models.hgrn.stub", "layer": DeltaNet})
    sys.modules["fla.models.hgrn.stub"] = sys.modules[__name__]
    refused(make(other), "HGRNForCausalLM .* is not verified")


def test_other_rotations_are_refused() -> None:
    model = lasp.parallelize(make(RetNetForCausalLM), None)
    model.attn.rotary.interleaved = True
    with pytest.raises(ValueError, match="interleaved"):
        model(IDS)


def test_a_loss_that_is_chosen_afterwards_is_refused() -> None:
    model = lasp.parallelize(make(GLAForCausalLM), None)
    model.config.use_l2warp = True
    with pytest.raises(ValueError, match="use_l2warp"):
        model(IDS)
    model.config.use_l2warp = False
    model.loss_function = torch.nn.functional.cross_entropy
    with pytest.raises(ValueError, match="loss_function was replaced"):
        model(IDS)


def test_padding_is_refused() -> None:
    model = lasp.parallelize(make(GLAForCausalLM), None)
    with pytest.raises(ValueError, match="no attention_mask here"):
        model(IDS, attention_mask=torch.ones_like(IDS))
