"""Models with every lever on, over ranks: the loss and the gradients of one device without any."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import lasp

pytest.importorskip("transformers")

from lasp.kernels import head
from lasp.models import LinearLlamaConfig, LinearLlamaForCausalLM
from tests.hf_models import make

pytestmark = pytest.mark.mpi
IDS = torch.randint(97, (2, 37), generator=torch.Generator().manual_seed(0))
LABELS = torch.cat([torch.full_like(IDS[:, :20], -100), IDS[:, 20:]], 1)  # contiguous: the first ranks have none


def build(name: str) -> Any:
    if name != "linear_llama":
        return make(name)
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return LinearLlamaForCausalLM(
        LinearLlamaConfig(**sizes, num_hidden_layers=2, pattern="LN", mixer="gated_deltanet", tie_word_embeddings=True)
    ).double()


@pytest.mark.parametrize("name", ["gemma2", "qwen3_5", "linear_llama"])
def test_all_levers_over_ranks(group_of, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(head, "TOKENS", 5)
    monkeypatch.setattr(head, "CLASSES", 40)
    model, whole = build(name), {"input_ids": IDS, "labels": LABELS}
    plain = lasp.parallelize(copy.deepcopy(model), None)
    expected = plain(**lasp.shard_batch(whole, None))
    expected.loss.backward()
    for size, layout in ((2, "zigzag"), (4, "contiguous")):
        if (group := group_of(size, layout)) is None:
            continue
        own = lasp.parallelize(copy.deepcopy(model), group)
        lasp.checkpoint_activations(lasp.tile_mlp(lasp.fuse_loss(own), 4), offload=True)
        found = own(**lasp.shard_batch(whole, group))
        found.loss.backward()
        lasp.sync_gradients(own, group)
        torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-10)
        torch.testing.assert_close(lasp.unshard(found.logits.detach(), group), expected.logits.detach())
        for one, two in zip(plain.parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(two.grad, one.grad, rtol=0, atol=1e-10)
