"""What is changed after `parallelize` and would let a rank work on its part alone is refused at the next call."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lasp

pytest.importorskip("transformers")

import torch.nn.functional as F
import transformers
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama import modeling_llama

from tests.hf_models import make_single

IDS = torch.arange(40).reshape(2, 20)
BATCH = lasp.shard_batch({"input_ids": IDS, "labels": IDS}, None)


@pytest.fixture
def model() -> Any:
    return lasp.parallelize(make_single("llama"), None)


def refused(model: Any, message: str, **batch: Any) -> None:
    with pytest.raises(ValueError, match=message):
        model(**(batch or BATCH))


def fused_loss(self, input_ids=None, position_ids=None, labels=None, shift_labels=None, use_cache=None, **kwargs):
    hidden = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache).last_hidden_state
    return CausalLMOutputWithPast(loss=F.cross_entropy(self.lm_head(hidden).flatten(0, 1), shift_labels.flatten()))


def scaled(self, hidden_states, *args, **kwargs):
    return 2 * hidden_states


@pytest.mark.parametrize("name", ["llama", "bamba"])
def test_a_part_outlives_the_whole(name: str) -> None:
    """The base model kept, the head and the loss forgotten: as exact as before, and as guarded."""
    model = make_single(name)
    before = model.model(IDS).last_hidden_state
    part = lasp.parallelize(model, None).model
    apart = copy.deepcopy(part)
    del model
    gc.collect()
    for left in (part, apart):
        torch.testing.assert_close(left(IDS).last_hidden_state, before)
        left.set_attn_implementation("eager")
        refused(left, "attention was set to eager", input_ids=IDS)
        left.set_attn_implementation("lasp")
    assert lasp.unparallelize(part)(IDS, use_cache=True).past_key_values is not None


# Attention


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_attention_that_is_set_again(model: Any, name: str) -> None:
    model.config._attn_implementation = name
    refused(model, f"attention was set to {name}")
    model.config._attn_implementation = "lasp"
    model(**BATCH)


def test_attention_of_the_model_of_a_layer_and_of_the_registry(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.set_attn_implementation("eager")
    refused(model, "attention was set to eager")
    refused(model.model, "attention was set to eager", input_ids=IDS)
    model.set_attn_implementation("lasp")
    layer = model.model.layers[1].self_attn
    ours, layer.config = layer.config, copy.deepcopy(layer.config)
    layer.config._attn_implementation = "sdpa"
    refused(model, "attention was set to sdpa")
    layer.config = ours
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "lasp", lambda *_, **__: None)
    refused(model, "attention was set to another function")


# Forwards


@pytest.mark.parametrize(
    ("cls", "forward"), [("LlamaForCausalLM", fused_loss), ("LlamaAttention", scaled), ("LlamaMLP", scaled)]
)
def test_a_class_with_a_forward_of_another_file(cls: str, forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_single("llama")
    own = lasp.parallelize(copy.deepcopy(model), None)
    monkeypatch.setattr(getattr(modeling_llama, cls), "forward", forward)
    for refuse in (
        lambda: own(**BATCH),
        lambda: lasp.parallelize(model, None),
        lambda: lasp.verify(model, None),
        lambda: lasp.verify(own, None),
    ):
        with pytest.raises(ValueError, match=rf"{cls}\.forward was patched \(from tests\.lasp\.test_wrap_guard\)"):
            refuse()


def test_a_decorated_forward_of_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """`functools.wraps` says that a function is another one's; where it was written says that it need not be."""
    import functools

    forward = functools.wraps(modeling_llama.LlamaAttention.forward)(scaled)
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    with pytest.raises(ValueError, match=r"LlamaAttention\.forward was patched"):
        lasp.parallelize(make_single("llama"), None)


@pytest.mark.parametrize("path", ["model", "model.layers.0.self_attn", "model.layers.1.mlp", "model.norm"])
def test_an_instance_with_a_forward_of_its_own(model: Any, path: str) -> None:
    plain = lasp.unparallelize(copy.deepcopy(model))
    for each in (model, plain):
        each.get_submodule(path).forward = lambda hidden_states, *_, **__: hidden_states
    refused(model, rf"{path}(\.forward was replaced|\.forward is not that of its class)")
    with pytest.raises(ValueError, match=f"forward of {path} is not that of its class"):
        lasp.parallelize(plain, None)


def test_a_model_whose_own_forward_was_replaced(model: Any) -> None:
    """Ours is not called any more; the model within is."""
    model.forward = fused_loss.__get__(model)
    refused(model, "the model's forward was replaced")
    del model.forward
    refused(model.model, "the model's forward was replaced", input_ids=IDS)


def test_autocast_around_a_forward_leaves_it_ours(model: Any) -> None:
    accelerate = pytest.importorskip("accelerate")

    before = model(**BATCH).loss
    model.forward = accelerate.utils.operations.convert_outputs_to_fp32(model.forward)
    torch.testing.assert_close(model(**BATCH).loss, before)
    torch.testing.assert_close(model.model(IDS).last_hidden_state.shape, torch.Size([2, 20, 32]))


def test_a_mixer_that_calls_its_own_recurrence_again() -> None:
    model = lasp.parallelize(make_single("mamba2"), None)
    mixer = next(m for m in model.modules() if type(m).__name__ == "Mamba2Mixer")
    method = "forward" if "forward" in vars(mixer) else "torch_forward"
    setattr(mixer, method, getattr(type(mixer), method).__get__(mixer))
    refused(model, f"{method} was replaced")


# The loss


def test_a_loss_that_is_set_again(model: Any) -> None:
    ours = model.loss_function
    model.loss_function = F.cross_entropy
    refused(model, "loss_function was replaced")
    del model._loss_function
    refused(model, "loss_function was replaced")
    model.loss_function = ours
    model(**BATCH)
    model.loss_function = F.cross_entropy
    assert lasp.unparallelize(model).loss_function is F.cross_entropy  # not ours to take away


def test_a_forward_that_does_not_come_to_the_loss(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "loss_function", lambda *_, **__: torch.zeros(()))
    refused(model, "LlamaForCausalLM took labels and did not call its loss_function")
    model(**lasp.shard_batch({"input_ids": IDS}, None))


# Modules


def other_attention(model: Any) -> None:
    model.model.layers[0].self_attn = make_single("llama").model.layers[0].self_attn


def one_more_layer(model: Any) -> None:
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))


def foreign_norm(model: Any) -> None:
    model.model.norm = torch.nn.BatchNorm1d(32)


@pytest.mark.parametrize("change", [other_attention, one_more_layer, foreign_norm])
def test_modules_that_join(model: Any, change: Callable[[Any], None]) -> None:
    change(model)
    refused(model, r"joined since lasp\.parallelize")


def resized(model: Any) -> None:
    model.resize_token_embeddings(104)


def headed(model: Any) -> None:
    model.value_head = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def checkpointed(model: Any) -> None:
    model.gradient_checkpointing_enable()


def compiled(model: Any) -> None:
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")


def adapted(model: Any) -> None:
    peft = pytest.importorskip("peft")
    options = {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, **options), model)


def pruned(model: Any) -> None:
    model.model.layers = model.model.layers[:2]


def evaluated(model: Any) -> None:
    model.eval().double().float().tie_weights()


@pytest.mark.parametrize("change", [resized, headed, checkpointed, compiled, adapted, pruned, evaluated])
def test_what_treats_every_token_by_itself_may_join(model: Any, change: Callable[[Any], None]) -> None:
    before = model(**BATCH).loss.detach()
    change(model)
    after = model(**BATCH).loss
    if change is not resized:
        torch.testing.assert_close(after.detach(), before)
    after.backward()


# Inputs


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("labels", [False, True])
def test_prompts_that_are_put_on_afterwards(model: Any, kind: str, labels: bool) -> None:
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM")
    batch = BATCH if labels else lasp.shard_batch({"input_ids": IDS}, None)
    refused(peft.get_peft_model(model, config), "prompts that peft puts|takes no past_key_values", **batch)


def test_embeddings_in_the_place_of_ids(model: Any) -> None:
    embedded = model.get_input_embeddings()(IDS)
    batch = lasp.shard_batch({"inputs_embeds": embedded, "labels": IDS}, None)
    torch.testing.assert_close(model(**batch).loss, model(**BATCH).loss)
    refused(model, "inputs_embeds need the position_ids", inputs_embeds=embedded)


@pytest.mark.parametrize("path", ["model.layers.0", "model.layers.1.self_attn"])
def test_tokens_put_in_within_the_model(model: Any, path: str) -> None:
    def lengthen(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = {
            k: F.pad(x, (0, 0, 0, 3)) if k in ("hidden_states", "inputs_embeds") else x for k, x in kwargs.items()
        }
        kwargs["position_embeddings"] = tuple(F.pad(x, (0, 0, 0, 3)) for x in kwargs.get("position_embeddings", ()))
        return tuple(F.pad(x, (0, 0, 0, 3)) for x in args), kwargs

    model.get_submodule(path).register_forward_pre_hook(lengthen, with_kwargs=True)
    refused(model, "LlamaAttention is given 23 tokens of this rank's 20")


@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv"])
def test_tokens_put_in_before_a_recurrence(name: str) -> None:
    model = lasp.parallelize(make_single(name), None)
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, output: F.pad(output, (0, 0, 3, 0)))
    refused(model, "is given 23 tokens of this rank's 20")


def test_noise_that_knows_a_part_alone(model: Any) -> None:
    embedding = model.get_input_embeddings()
    embedding.neftune_noise_alpha = 5.0
    hook = embedding.register_forward_hook(neftune_post_forward_hook)
    refused(model, "neftune_noise_alpha: the noise on model.embed_tokens")
    hook.remove()
    model(**BATCH)


def test_layers_that_are_left_out() -> None:
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_attention_heads": 4, "vocab_size": 97}
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, num_hidden_layers=2, layerdrop=0.5))
    with pytest.raises(ValueError, match=r"layerdrop=0\.5"):
        lasp.parallelize(model, None)


@pytest.mark.parametrize("part", ["inputs", "configuration"])
def test_attention_weights_are_not_kept(model: Any, part: str) -> None:
    if part == "configuration":
        model.config._attn_implementation = "eager"  # transformers asks for it
        model.config.output_attentions = True
        model.config._attn_implementation = "lasp"
    refused(model, "keeps no attention weights", **BATCH, **({"output_attentions": True} if part == "inputs" else {}))


# The model without its head


@pytest.mark.parametrize("name", ["llama", "qwen3_5", "mamba2"])
def test_the_base_model_by_itself(name: str) -> None:
    plain = make_single(name)
    expected = plain.base_model(IDS, use_cache=False, output_hidden_states=True)
    model = lasp.parallelize(plain, None)
    result = model.base_model(IDS, output_hidden_states=True)
    torch.testing.assert_close(result.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(result.hidden_states, expected.hidden_states)
    if name != "mamba2":
        refused(model.get_decoder(), "position_ids must count", input_ids=IDS, position_ids=IDS % 5)
    torch.testing.assert_close(copy.deepcopy(model).base_model(input_ids=IDS)[0], expected.last_hidden_state)
