"""Each lever on a model, and all of them: the same loss, and every gradient, as without."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lasp

pytest.importorskip("transformers")

import transformers

from lasp.kernels import head
from lasp.kernels.logits import Logits
from lasp.memory import parts
from lasp.models import LinearLlamaConfig, LinearLlamaForCausalLM
from tests.hf_models import FAMILIES, make, make_single

IDS = torch.randint(97, (2, 23), generator=torch.Generator().manual_seed(0))
LABELS = torch.cat([torch.full_like(IDS[:, :9], -100), IDS[:, 9:]], 1)
Lever = Callable[[Any], Any]
LEVERS: dict[str, Lever] = {
    "fused loss": lasp.fuse_loss,
    "tiles": partial(lasp.tile_mlp, tokens=5),
    "layers": lasp.checkpoint_activations,
    "every second layer": partial(lasp.checkpoint_activations, every=2, offload=True),
    "mixers": partial(lasp.checkpoint_activations, only="mixers"),
    "all": lambda model: lasp.checkpoint_activations(lasp.tile_mlp(lasp.fuse_loss(model), 5), offload=True),
}
# Softcapped logits and a tied head; experts and routers; recurrences; our own.
QUICK = ("gemma2", "qwen3_next", "mamba2", "linear_llama")
WITHOUT = {"rwkv": "tiles"}  # its feed-forward sees the token before


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "TOKENS", 16)
    monkeypatch.setattr(head, "CLASSES", 40)


def build(name: str) -> Any:
    if name != "linear_llama":
        return lasp.parallelize(make(name), None)
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LinearLlamaConfig(**sizes, num_hidden_layers=2, pattern=["gla", "softmax"], tie_word_embeddings=True)
    return LinearLlamaForCausalLM(config).double()


def step(model: Any) -> Any:
    """A training step's output; the gradients are the parameters'."""
    model.zero_grad()
    balance = {"output_router_logits": True} if hasattr(model.config, "output_router_logits") else {}
    output = model(**lasp.shard_batch({"input_ids": IDS, "labels": LABELS}, None), **balance)
    output.loss.backward()
    return output


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if n not in QUICK)]
)
def test_levers_change_nothing(name: str) -> None:
    plain = build(name)
    expected = step(plain)
    for lever, pull in LEVERS.items():
        if WITHOUT.get(name) in (lever, "tiles" if lever == "all" else ""):
            continue
        own = pull(copy.deepcopy(plain))
        found = step(own)
        torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-12)
        for one, two in zip(plain.parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(two.grad, one.grad, rtol=0, atol=1e-12)
        fused = lever in ("fused loss", "all")
        assert (isinstance(found.logits, Logits) and found.logits._numbers is None) == fused
        torch.testing.assert_close(found.logits + 0, expected.logits, rtol=0, atol=1e-12)


def test_layers_are_computed_again_and_tiles_are_small() -> None:
    model = build("linear_llama")
    sizes: dict[str, list[int]] = {"mixer": [], "mlp": []}
    for layer in model.model.layers:
        layer.mixer.register_forward_pre_hook(lambda _, args: sizes["mixer"].append(args[0].shape[1]))
        layer.mlp.gate_proj.register_forward_pre_hook(lambda _, args: sizes["mlp"].append(args[0].shape[1]))
    step(lasp.checkpoint_activations(copy.deepcopy(model), every=2))
    assert sizes == {"mixer": [23] * 3, "mlp": [23] * 3}
    sizes["mixer"].clear()
    sizes["mlp"].clear()
    step(lasp.tile_mlp(model, 20))
    assert sizes == {"mixer": [23] * 2, "mlp": [20, 20, 6] * 2 + sizes["mlp"][6:]}
    assert sorted(sizes["mlp"][6:]) == [6, 6, 20, 20, 20, 20]
    model.eval()
    with torch.no_grad():
        model(IDS)
    assert sizes["mlp"][12:] == [23, 23]


def test_what_a_checkpoint_keeps_goes_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = build("llama"), []

    def save_on_cpu(pin_memory: bool) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x)

    monkeypatch.setattr("lasp.memory.checkpoints.save_on_cpu", save_on_cpu)
    step(lasp.checkpoint_activations(model, offload=True))
    assert [shape for shape in kept if shape.numel() > 2 * 23] == [(2, 23, 32)] * 2


def test_of_what_went_to_the_cpu_nothing_stays_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def save_on_cpu(pin_memory: bool) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x)

    monkeypatch.setattr("lasp.memory.checkpoints.save_on_cpu", save_on_cpu)
    model, inputs = LEVERS["all"](build("linear_llama")), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    loss = model(**lasp.shard_batch({"input_ids": IDS, "labels": LABELS}, None)).loss
    assert len(inputs) == 2
    assert not any(x() is not None for x in inputs)
    loss.backward()


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next"])
def test_lora_in_tiles(name: str) -> None:
    """On linear layers; and on the parameters of experts, where it acts within peft's wrapper alone."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    plain = lasp.parallelize(peft.get_peft_model(make(name), config).double(), None)
    step(plain)
    own = LEVERS["all"](copy.deepcopy(plain))
    step(own)
    for one, two in zip(plain.parameters(), own.parameters(), strict=True):
        assert one.requires_grad or two.grad is None
        torch.testing.assert_close(two.grad, one.grad, rtol=0, atol=1e-12)


def test_undone_verified_and_generating() -> None:
    model = make_single("qwen3_5")
    before = model(IDS).logits
    lasp.parallelize(model, None)
    assert lasp.verify(LEVERS["all"](model), None, 40).exact
    lasp.unparallelize(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(IDS).logits, before)
    own = lasp.fuse_loss(build("linear_llama")).eval()
    plain = build("linear_llama").eval()
    assert torch.equal(own.generate(IDS, max_new_tokens=5), plain.generate(IDS, max_new_tokens=5))


def test_log_probabilities_of_a_model_make_no_logits() -> None:
    model = build("gemma2")
    batch = lasp.shard_batch({"input_ids": IDS, "labels": LABELS}, None)
    labels, cut = batch.pop("shift_labels"), batch["cut"]
    batch.pop("labels")
    expected = lasp.token_log_probs(model(**batch).logits, None, labels, cut=cut)
    logits = lasp.fuse_loss(model)(**batch).logits
    torch.testing.assert_close(lasp.token_log_probs(logits, None, labels, cut=cut), expected, rtol=0, atol=1e-12)
    assert logits._numbers is None


def test_a_head_sharded_by_itself_is_an_error() -> None:
    layer = nn.Linear(4, 6)
    logits = Logits.of(layer, torch.zeros(1, 3, 4))
    layer.weight.untyped_storage().resize_(0)  # as FSDP2 does when a module is through
    with pytest.raises(ValueError, match="the head's weight is sharded there"):
        lasp.cross_entropy(logits, torch.zeros(1, 3).long())


class Unknown(nn.Module):
    config = transformers.LlamaConfig()


@pytest.mark.parametrize(
    ("pull", "message"),
    [
        (lambda m: lasp.tile_mlp(m, 0), "tokens must be a whole number of at least 1, got 0"),
        (lambda m: lasp.checkpoint_activations(m, every=0), "every must be a whole number of at least 1, got 0"),
        (lambda m: lasp.checkpoint_activations(m, only="layer"), "did you mean 'layers'"),
        (lambda m: lasp.checkpoint_activations(m, offload=1), "offload must be True or False, got 1"),
        (lambda m: lasp.checkpoint_activations(Unknown()), "Unknown has no list of layers"),
        (lambda m: lasp.tile_mlp(Unknown()), "Unknown has no MLP, experts or norms"),
        (lambda m: lasp.fuse_loss(lasp.unparallelize(m)), "LlamaForCausalLM computes its loss from logits"),
        (
            lambda m: lasp.fuse_loss(m.set_output_embeddings(nn.Identity()) or m),
            "the head of LlamaForCausalLM is no linear layer",
        ),
    ],
)
def test_what_is_refused(pull: Lever, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pull(lasp.parallelize(make_single("llama"), None))


def test_parts_of_a_hybrid() -> None:
    model = make_single("qwen3_next")
    names = {module: name for name, module in model.named_modules()}
    tiled = [names[module] for module in parts.tokenwise_parts(model)]
    assert tiled == [
        *(
            f"model.layers.{i}.{part}"
            for i in range(2)
            for part in ("mlp.experts", "mlp.shared_expert", "input_layernorm", "post_attention_layernorm")
        ),
        "model.norm",
    ]
    assert [names[m] for layer in parts.layers_of(model) for m in parts.mixers_of(layer)] == [
        "model.layers.0.linear_attn",
        "model.layers.1.self_attn",
    ]


def test_nothing_is_kept_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd keeps between forward and backward: with all levers, inputs of layers and little more."""

    def kept(model: Any) -> int:
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        batch = lasp.shard_batch({"input_ids": IDS, "labels": LABELS}, None)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(**batch)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(size for pointer, size in storages.items() if pointer not in own)

    plain = build("qwen3_5")
    assert kept(LEVERS["all"](copy.deepcopy(plain))) < kept(plain) / 8
