"""lasp.save_pretrained on one device: what peft reads back is the model that was saved."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lasp

peft = pytest.importorskip("peft")


def frozen_half(model: Any) -> None:
    """LoRA-FA (arXiv:2308.03303) trains B alone."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)


def for_inference(model: Any) -> None:
    model.requires_grad_(False)


def another_task(model: Any) -> None:
    model.add_adapter("other", peft.LoraConfig(target_modules=["v_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("other")


@pytest.mark.parametrize("freeze", [frozen_half, for_inference, another_task])
def test_adapters_that_are_not_trained_are_saved(tmp_path: Path, freeze: Any) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)  # not 0
    model = peft.get_peft_model(deepcopy(base), lora)
    freeze(model)
    lasp.save_pretrained(model, tmp_path)
    model.set_adapter("default")
    ids = torch.arange(12).unsqueeze(0)
    found = peft.PeftModel.from_pretrained(base, tmp_path).eval()(ids).logits
    torch.testing.assert_close(found, model.eval()(ids).logits)
