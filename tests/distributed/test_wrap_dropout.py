"""Dropout drops the same numbers on any number of ranks: losses and gradients of a training step with it are equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lasp
from lasp.models import LinearLlamaConfig, LinearLlamaForCausalLM

pytest.importorskip("transformers")

import transformers

from tests.hf_models import make

GroupOf = Callable[..., lasp.SequenceGroup | None]
IDS = torch.randint(3, 97, (2, 150), generator=torch.Generator().manual_seed(1))  # of three blocks of positions


def gpt2() -> Any:
    """Modules after embeddings, attention and MLP."""
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, attn_pdrop=0.0, resid_pdrop=0.3)).double()


def opt() -> Any:
    """`nn.functional.dropout` within layers that checkpoint themselves."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_attention_heads": 4, "vocab_size": 97}
    config = transformers.OPTConfig(**sizes, num_hidden_layers=2, dropout=0.3, max_position_embeddings=160)
    return transformers.OPTForCausalLM(config).double()


def starcoder2() -> Any:
    """`nn.functional.dropout` in the base model's own forward too."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.Starcoder2Config(
        **sizes, num_key_value_heads=2, num_hidden_layers=1, embedding_dropout=0.2, residual_dropout=0.3
    )
    return transformers.Starcoder2ForCausalLM(config).double()


def adapted(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, lora_dropout=0.4, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, lora).double()


def lora() -> Any:
    return adapted(make("llama"))


def own_lora() -> Any:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = adapted(LinearLlamaForCausalLM(LinearLlamaConfig(**sizes, num_hidden_layers=2, pattern="LN")).double())
    model.enable_input_require_grads()  # what is checkpointed needs an input that has a gradient
    return model


def seeded(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return build().train()


def step(model: Any, group: lasp.SequenceGroup | None, ids: Tensor, seed: int = 5) -> Tensor:
    torch.manual_seed(seed)
    return model(**lasp.shard_batch({"input_ids": ids, "labels": ids}, group)).loss


def gradients(model: Any, group: lasp.SequenceGroup | None) -> dict[str, Tensor]:
    if group is not None:
        lasp.sync_gradients(model, group)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "build", [gpt2, opt, lora, *(pytest.param(build, marks=pytest.mark.slow) for build in (starcoder2, own_lora))]
)
def test_equal_on_any_number_of_ranks(group_of: GroupOf, build: Callable[[], Any]) -> None:
    model = seeded(build)
    one = lasp.parallelize(copy.deepcopy(model), None)
    expected = step(one, None, IDS)
    expected.backward()
    with torch.no_grad():
        assert abs(step(one.eval(), None, IDS) - expected) > 1e-4  # it drops
    for size, layout, checkpointing in ((2, "zigzag", False), (4, "contiguous", True)):
        group = group_of(size, layout)
        if group is not None:
            own = lasp.parallelize(copy.deepcopy(model), group)
            if checkpointing:
                own.gradient_checkpointing_enable({"use_reentrant": False})
            loss = step(own, group, IDS)
            loss.backward()
            torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
            assert_equal(gradients(own, group), gradients(one, None))


@pytest.mark.parametrize("build", [gpt2, opt])
@pytest.mark.parametrize("reentrant", [False, True])
def test_two_forwards_of_other_lengths_before_their_backwards(
    group_of: GroupOf, build: Callable[[], Any], reentrant: bool
) -> None:
    """Checkpointing repeats the layers of the first batch when the second was the last to be seen."""
    group, model = group_of(4), seeded(build)
    one, own = lasp.parallelize(copy.deepcopy(model), None), lasp.parallelize(copy.deepcopy(model), group)
    own.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for each, where in ((one, None), (own, group)):
        losses = [step(each, where, IDS[:, :length], seed=length) for length in (150, 147, 90)]
        (losses[0] - 2 * losses[1] + 3 * losses[2]).backward()
    assert_equal(gradients(own, group), gradients(one, None))


def test_adapters_that_join_later(group_of: GroupOf) -> None:
    group = group_of(4)
    torch.manual_seed(0)
    one = adapted(lasp.parallelize(make("llama"), None)).train()
    torch.manual_seed(0)
    own = adapted(lasp.parallelize(make("llama"), group)).train()
    expected, loss = step(one, None, IDS), step(own, group, IDS)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)


def test_noise_on_a_router_is_a_ranks_own(group_of: GroupOf) -> None:
    group = group_of(4)
    assert group is not None
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.MixtralConfig(
        **sizes, num_key_value_heads=2, num_hidden_layers=1, num_local_experts=4, router_jitter_noise=0.1
    )
    model = lasp.parallelize(transformers.MixtralForCausalLM(config), group).train()
    seen: list[Tensor] = []
    moe = model.model.layers[0].mlp
    moe.gate.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach().clone()))
    for _ in range(2):
        torch.manual_seed(0)
        moe(torch.ones(1, 3, 32))
    torch.testing.assert_close(seen[0], seen[1])
    parts = lasp.unshard(seen[0].reshape(1, -1), group, 0)
    assert (parts[0] - parts[1:]).abs().amax(1).min() > 1e-3
