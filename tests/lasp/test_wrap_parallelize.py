"""Wrapping a Hugging Face model on one device: refused, left alone, restored, copied."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from io import BytesIO
from itertools import pairwise
from typing import Any

import pytest
import torch

import lasp
from lasp.launch.verify import configuration, tiny_model

pytest.importorskip("transformers")

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.hf_models import FAMILIES, make, make_single

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1,
    "attn_implementation": "eager",
}  # fmt: skip
IDS = torch.arange(40).reshape(2, 20)
REFUSE_DOCUMENTS = {"xlstm", "llama_dynamic", "phi3_longrope"}


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
        ({"position_ids": IDS[:1, :7]}, "position_ids must count"),
        ({"attention_mask": torch.ones(2, 1, 20, 20)}, "2-D attention_mask"),
        ({"logits_to_keep": 1}, "logits_to_keep"),
        ({"logits_to_keep": torch.tensor([0])}, "logits_to_keep"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_bad_inputs(config: Any, inputs: dict[str, Any], message: str) -> None:
    model = lasp.parallelize(transformers.LlamaForCausalLM(config), None)
    with pytest.raises(ValueError, match=message):
        model(IDS, **inputs)


@pytest.mark.parametrize("ids", [IDS.tolist(), IDS[0], IDS.float(), IDS[:0]], ids=["list", "row", "floats", "no row"])
def test_what_are_no_tokens(config: Any, ids: Any) -> None:
    model = lasp.parallelize(transformers.LlamaForCausalLM(config), None)
    with pytest.raises(ValueError, match=r"takes input_ids \[B, T\], integers"):
        model(input_ids=ids)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, partial(torch.compile, backend="eager"), torch.nn.Sequential])
def test_what_is_around_a_model_comes_afterwards(config: Any, wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match="is around a LlamaForCausalLM: parallelize that"):
        lasp.parallelize(wrap(transformers.LlamaForCausalLM(config)), None)


@pytest.mark.parametrize("model", [None, "llama", 3])
def test_what_is_no_model(model: Any) -> None:
    for call in (lasp.parallelize, lasp.verify):
        with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module"):
            call(model, None)


def test_it_is_saved_after_it_is_restored(config: Any) -> None:
    model = lasp.parallelize(transformers.LlamaForCausalLM(config), None)
    with pytest.raises(TypeError, match=r"after lasp.unparallelize\(model\)"):
        torch.save(model, BytesIO())
    torch.save(lasp.unparallelize(model), BytesIO())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_verify_in_any_mode(config: Any, mode: Callable[[], Any]) -> None:
    model = transformers.LlamaForCausalLM(config)
    with mode():
        assert lasp.verify(model, None, seq_len=9).exact
        assert lasp.verify(model.requires_grad_(False), None, seq_len=2).gradients == {}
    for length in (1, 0, 2.0):
        with pytest.raises(ValueError, match="seq_len must be a whole number of at least 2"):
            lasp.verify(model, None, length)


class Mean(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1, keepdim=True).expand_as(x)


def test_unknown_models_are_refused() -> None:
    model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match="BloomAttention"):
        lasp.parallelize(model, None)


@pytest.mark.parametrize(
    "module", [Mean(), torch.nn.Conv1d(32, 32, 3), torch.nn.GRU(32, 32), torch.nn.MultiheadAttention(32, 4)]
)
def test_foreign_modules_are_refused(config: Any, module: torch.nn.Module) -> None:
    model = transformers.LlamaForCausalLM(config)
    model.model.layers[0].mlp = module
    with pytest.raises(ValueError, match=rf"model\.layers\.0\.mlp \({type(module).__name__}\)"):
        lasp.parallelize(model, None)


def test_token_wise_modules_are_not(config: Any) -> None:
    model = transformers.LlamaForCausalLM(config)
    model.model.layers[0].mlp = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.SiLU(), torch.nn.Linear(48, 32))
    before = model(IDS).logits
    torch.testing.assert_close(lasp.parallelize(model, None)(IDS).logits, before)


def test_adapters_that_add_no_tokens_are_taken(config: Any) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"])
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    before = model(IDS).logits
    torch.testing.assert_close(lasp.parallelize(model, None)(IDS).logits, before)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="PromptTuningConfig puts tokens of its own"):
        lasp.parallelize(peft.get_peft_model(transformers.LlamaForCausalLM(config), prompt), None)


@pytest.mark.parametrize("option", ["attention", "scan"])
def test_unknown_ways_to_exchange_are_refused_at_once(config: Any, option: str) -> None:
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match=f"{option} must be one of auto, .*got 'telepathy'"):
        lasp.parallelize(model, None, **{option: "telepathy"})
    lasp.parallelize(model, None)


def test_a_loss_of_ones_own_is_refused(config: Any) -> None:
    model = transformers.LlamaForCausalLM(config)
    model.loss_function = torch.nn.functional.cross_entropy
    with pytest.raises(ValueError, match="loss_function of its own"):
        lasp.parallelize(model, None)


@pytest.mark.parametrize("name", ["llama", "xlstm"])  # one with a cache, and one that would go on without
def test_generates_only_when_restored(name: str) -> None:
    model = lasp.parallelize(make_single(name).eval(), None)
    with pytest.raises(ValueError, match="unparallelize to generate"):
        model.generate(IDS, max_new_tokens=2)
    assert lasp.unparallelize(model).generate(IDS, max_new_tokens=2).shape == (2, 22)


def test_wrong_class_and_kernels_are_refused(config: Any) -> None:
    with pytest.raises(ValueError, match="causal language models"):
        lasp.parallelize(transformers.LlamaForSequenceClassification(config), None)
    model = transformers.LlamaForCausalLM(config)
    model._use_kernels = True
    with pytest.raises(ValueError, match="use_kernels"):
        lasp.parallelize(model, None)


def test_recurrences_of_one_instance_only() -> None:
    """Restored, copied, and a second instance of the class untouched."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1}
    model, other = (transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)) for _ in range(2))
    before = model(IDS).logits
    lasp.parallelize(model, None)
    assert "forward" in vars(model.backbone.layers[0].mixer)
    assert "forward" not in vars(other.backbone.layers[0].mixer)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.backbone.layers[0].mixer.D.zero_()
    torch.testing.assert_close(model(IDS).logits, before)
    assert (twin(IDS).logits - before).abs().max() > 1e-6
    lasp.unparallelize(model)
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.backbone.layers[0].mixer)
    torch.testing.assert_close(model(IDS).logits, before)


@pytest.mark.parametrize("name", ["mamba", "rwkv", "recurrent_gemma"])
def test_documents_reach_mixers_that_the_model_tells_nothing(name: str) -> None:
    test_documents_are_isolated_or_refused(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_documents_are_isolated_or_refused(name: str) -> None:
    """As docs/huggingface.md says which."""
    model, bounds = make(name), [0, 1, 7, 20]
    apart = torch.cat([model(IDS[:1, a:b], use_cache=False).logits for a, b in pairwise(bounds)], 1)
    lasp.parallelize(model, None)
    batch = lasp.shard_batch({"input_ids": IDS[:1], "cu_seqlens": torch.tensor(bounds)}, None)
    if name in REFUSE_DOCUMENTS:
        with pytest.raises(ValueError, match=r"mLSTM takes no packed documents|rope_type"):
            model(**batch)
    else:
        torch.testing.assert_close(model(**batch).logits, apart, rtol=0, atol=1e-9)


def test_rope_of_one_length_takes_no_documents(config: Any) -> None:
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = lasp.parallelize(transformers.LlamaForCausalLM(config), None)
    batch = lasp.shard_batch({"input_ids": IDS[:1], "cu_seqlens": torch.tensor([0, 7, 20])}, None)
    with pytest.raises(ValueError, match="dynamic"):
        model(**batch)


@pytest.mark.parametrize("name", ["llama", "qwen3_5", "bailing_hybrid", "falcon_h1"])
def test_autocast(name: str) -> None:
    """As near to fp32 as transformers itself comes."""
    model = make_single(name)
    exact = model(IDS, use_cache=False).logits
    with torch.autocast("cpu", torch.bfloat16):
        theirs = model(IDS, use_cache=False).logits
        ours = lasp.parallelize(model, None)(**lasp.shard_batch({"input_ids": IDS, "labels": IDS}, None))
    ours.loss.backward()
    assert (ours.logits - exact).abs().max() < 2 * (theirs - exact).abs().max()


def test_opt_refuses_what_it_would_count_by_itself() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_attention_heads": 4}
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, num_hidden_layers=1, dropout=0.0))
    mask = torch.ones_like(IDS)
    before = model(IDS, attention_mask=mask).logits
    lasp.parallelize(model, None)
    torch.testing.assert_close(model(IDS, attention_mask=mask).logits, before)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="OPT counts positions"):
        model(IDS, attention_mask=mask)


@pytest.mark.slow
@torch.no_grad()
def test_padding_is_exact_or_refused() -> None:
    """Of every verified model type, on one device: what its positions and masks make of padding."""
    wrong, ids = {}, torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            model = tiny_model(configuration(name)).eval()
            own = lasp.parallelize(copy.deepcopy(model), None)
        except ValueError:
            continue
        for hidden in (slice(11), slice(26, None)):
            mask = torch.ones_like(ids)
            mask[0, hidden] = 0
            expected = model(ids, attention_mask=mask, use_cache=False).logits
            try:
                difference = own(**lasp.shard_batch({"input_ids": ids, "attention_mask": mask}, None)).logits - expected
            except ValueError:
                continue
            error = float(difference[mask.bool()].abs().max() / expected[mask.bool()].abs().max())
            if not error < 1e-3:
                wrong[name] = error
    assert wrong == {}
