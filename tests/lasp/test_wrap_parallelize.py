"""Wrapping a Hugging Face model on one device: refused, left alone, restored, copied."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import lasp

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1,
    "attn_implementation": "eager",
}  # fmt: skip
IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture
def config() -> Any:
    return transformers.LlamaConfig(**SIZES)


def test_restored_and_others_untouched(config: Any) -> None:
    model, other = (transformers.LlamaForCausalLM(config) for _ in range(2))
    before = model(IDS).logits
    lasp.parallelize(model, None)
    assert other.config._attn_implementation == "eager"
    torch.testing.assert_close(model(IDS).logits, before)
    torch.testing.assert_close(copy.deepcopy(model)(IDS).logits, before)
    assert model(IDS).past_key_values is None
    lasp.unparallelize(model)
    assert model(IDS, labels=IDS).past_key_values is not None
    with pytest.raises(ValueError, match="not parallelised"):
        lasp.unparallelize(model)


def test_documents_are_isolated(config: Any) -> None:
    model = transformers.LlamaForCausalLM(config)
    apart = torch.cat([model(IDS[:1, :7]).logits, model(IDS[:1, 7:]).logits], 1)
    lasp.parallelize(model, None)
    batch = lasp.shard_batch({"input_ids": IDS[:1], "cu_seqlens": torch.tensor([0, 7, 20])}, None)
    torch.testing.assert_close(model(**batch).logits, apart)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"labels": IDS}, "shift_labels"),
        ({"position_ids": IDS % 5}, "position_ids"),
        ({"attention_mask": torch.ones(2, 1, 20, 20)}, "2-D attention_mask"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_bad_inputs(config: Any, inputs: dict[str, Any], message: str) -> None:
    model = lasp.parallelize(transformers.LlamaForCausalLM(config), None)
    with pytest.raises(ValueError, match=message):
        model(IDS, **inputs)


def test_unknown_models_are_refused() -> None:
    model = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(ValueError, match="MambaMixer"):
        lasp.parallelize(model, None)


def test_rope_of_the_local_length_is_refused(config: Any) -> None:
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="dynamic"):
        lasp.parallelize(transformers.LlamaForCausalLM(config), None)
