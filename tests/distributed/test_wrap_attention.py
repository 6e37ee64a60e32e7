"""Hugging Face models with softmax attention: loss, logits and every gradient equal those of one device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lasp
from lasp.wrap.parallelize import parallelize

transformers = pytest.importorskip("transformers")
BASE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "max_position_embeddings": 128, "attn_implementation": "eager", "head_dim": 8,
}  # fmt: skip


def make(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**BASE, **options)
    return getattr(transformers, name + "ForCausalLM")(config).double()


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", ["Llama", "Qwen2", "Qwen3", "Mistral", "padding", "checkpointing"])
def test_equals_one_device(
    group_of: Callable[..., lasp.SequenceGroup | None], size: int, layout: str, case: str
) -> None:
    group = group_of(size, layout)
    if group is None:
        return
    model = make(
        "Llama" if case in ("padding", "checkpointing") else case,
        **({"sliding_window": 9} if case == "Mistral" else {}),
    )
    ids = torch.randint(97, (2, 37))
    labels, batch = ids.clone(), {"input_ids": ids}
    if case == "padding":
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, 30:] = 0
        labels[0, 30:] = -100
    own = parallelize(copy.deepcopy(model), group)
    if case == "checkpointing":
        own.train().gradient_checkpointing_enable()
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    logits = model(**batch, use_cache=False).logits
    loss = lasp.cross_entropy(logits, targets)
    loss.backward()
    result = own(**lasp.shard_batch({**batch, "labels": labels}, group))
    result.loss.backward()
    lasp.sync_gradients(own, group)
    torch.testing.assert_close(result.loss, loss, rtol=0, atol=1e-7)
    whole = lasp.unshard(result.logits.detach(), group)
    seen = batch.get("attention_mask", torch.ones_like(ids)).bool()
    torch.testing.assert_close(whole[seen], logits.detach()[seen], rtol=0, atol=1e-6)
    for (name, one), two in zip(model.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
