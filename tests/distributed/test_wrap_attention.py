"""Hugging Face models with softmax attention: loss, logits and every gradient equal those of one device."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from types import ModuleType
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


@cache
def in_double(name: str) -> ModuleType:
    """The library's source of a model with its fp32 norms, rotations and softmax in fp64, under a name of its own."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    source = inspect.getsource(module).replace("torch.float32", "torch.float64").replace(".float()", ".double()")
    twin = ModuleType(f"{module.__name__}_double")
    twin.__package__, twin.__file__ = module.__package__, module.__file__
    sys.modules[twin.__name__] = twin
    exec(compile(source, str(module.__file__), "exec"), twin.__dict__)
    return twin


def make(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**BASE, **options)
    return getattr(in_double(name.lower()), name + "ForCausalLM")(config).double()


CASES = {name: (name, "plain") for name in ("Llama", "Qwen2", "Qwen3", "Mistral")} | {
    "padding": ("Llama", "padding"),
    "checkpointing": ("Llama", "checkpointing"),
    "documents": ("Mistral", "documents"),
}
BOUNDS = [0, 1, 10, 10, 31, 37]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_equals_one_device(
    group_of: Callable[..., lasp.SequenceGroup | None], size: int, layout: str, case: str
) -> None:
    group = group_of(size, layout)
    if group is None:
        return
    name, kind = CASES[case]
    model = make(name, **({"sliding_window": 9} if name == "Mistral" else {}))
    ids = torch.randint(97, (1 if kind == "documents" else 2, 37))
    labels, batch = ids.clone(), {"input_ids": ids}
    if kind == "padding":
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, 30:] = 0
        labels[0, 30:] = -100
    own = parallelize(copy.deepcopy(model), group)
    if kind == "checkpointing":
        own.train().gradient_checkpointing_enable()
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    if kind == "documents":
        batch["cu_seqlens"] = torch.tensor(BOUNDS)
        targets[0, [end - 1 for end in BOUNDS[1:]]] = -100
        parts = [model(ids[:, a:b], use_cache=False).logits for a, b in pairwise(BOUNDS) if a < b]
        logits = torch.cat(parts, 1)
    else:
        logits = model(**batch, use_cache=False).logits
    loss = lasp.cross_entropy(logits, targets)
    loss.backward()
    result = own(**lasp.shard_batch({**batch, "labels": labels}, group))
    result.loss.backward()
    lasp.sync_gradients(own, group)
    torch.testing.assert_close(result.loss, loss, rtol=0, atol=1e-10)
    whole = lasp.unshard(result.logits.detach(), group)
    seen = batch.get("attention_mask", torch.ones_like(ids)).bool()
    torch.testing.assert_close(whole[seen], logits.detach()[seen], rtol=0, atol=1e-9)
    for (name, one), two in zip(model.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
