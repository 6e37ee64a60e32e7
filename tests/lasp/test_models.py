"""Linear-Llama3 and its hybrids: configuration, forward and loss, generation from states, saving and loading."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lasp
from lasp.layers import MIXERS, KeyValues

transformers = pytest.importorskip("transformers")
models = pytest.importorskip("lasp.models")

from lasp.models.cache import NAME, NAMES  # noqa: E402 (behind what may skip)

PROMPT, NEW = 7, 9
# Models of every mixer, and hybrids.
KINDS = {name: {"mixer": name} for name in MIXERS} | {
    "hgrn2, bounds": {"mixer": "hgrn2", "pattern": "LNLL", "mixer_options": {"hgrn2": {"learned_bounds": True}}},
    "gla, narrow keys": {"mixer": "gla", "mixer_options": {"gla": {"expand_k": 0.5}}},
    "LLLN": {"pattern": "LLLN"},
    "LNLN": {"pattern": ["retention", "softmax"], "mixer_options": {"softmax": {"window": 5}}},
    "NNNN": {"pattern": "NNNN", "num_key_value_heads": 2},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def small(kind: str = "lightning", **overrides: object) -> "models.LinearLlamaForCausalLM":
    torch.manual_seed(0)
    fields = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, **KINDS[kind], **overrides}
    config = models.LinearLlamaConfig.preset("tiny", **fields)
    # Weights large enough for clear winners among the logits.
    config.initializer_range = 0.3
    return models.LinearLlamaForCausalLM(config).double().eval()


def text(batch: int = 2, length: int = PROMPT) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 61, (batch, length))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Configuration


def test_pattern_is_repeated_over_the_layers() -> None:
    preset = models.LinearLlamaConfig.preset
    assert preset("tiny", pattern="LL", mixer="retention").layer_mixers == ["retention"] * 4
    assert preset("tiny", pattern=["lightning", "linear"]).layer_mixers == ["lightning", "linear"] * 2
    assert preset("tiny", pattern="LLLN").layer_mixers == ["lightning"] * 3 + ["softmax"]
    assert preset("tiny", pattern=["lightning"] * 3 + ["softmax"]).layer_mixers == ["lightning"] * 3 + ["softmax"]
    eighth = preset("tiny", pattern="LLLLLLLN", num_hidden_layers=16, mixer="linear").layer_mixers
    assert eighth == (["linear"] * 7 + ["softmax"]) * 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pattern": "LLL"}, "'LLL' \\(length 3\\) for 4 layers"),
        ({"pattern": ""}, "length 0"),
        ({"pattern": "LLLX"}, "'X'"),
        ({"pattern": ["lightning", "mamba9"]}, "unknown mixer 'mamba9'"),
        ({"mixer": "lightening"}, "known: based, delta_product, "),
        ({"mixer_options": {"lightning": {"slope": 1}}}, "'slope'.*known: \\['slopes'\\]"),
        (
            {"mixer_options": {"linear": {"causal": False}}},
            "'causal'.*known: \\['feature_map', 'normalise', 'rope_theta'\\]",
        ),
        ({"hidden_sise": 3}, "'hidden_sise'"),
    ],
)
def test_mistakes_in_the_configuration_are_value_errors(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        models.LinearLlamaConfig.preset("tiny", **fields)


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'7b'; known: tiny, 160m, 410m, 1b"):
        models.LinearLlamaConfig.preset("7b")


def test_mixer_options_reach_the_layers() -> None:
    options = {"retention": {"rope_theta": 3e5}, "softmax": {"window": 6}}
    layers = small("retention", pattern="LN", mixer_options=options).model.layers
    assert layers[2].mixer.rotary.theta == 3e5
    assert layers[3].mixer.window == 6


@pytest.mark.parametrize(("mixer", "projections"), [("lightning", 5), ("retention", 5), ("linear", 4)])
def test_parameters_of_the_1b_preset(mixer: str, projections: int) -> None:
    config = models.LinearLlamaConfig.preset("1b", mixer=mixer)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (16, 2048, 16)
    with torch.device("meta"):
        model = models.LinearLlamaForCausalLM(config)
    block = projections * 2048**2 + 128 + 3 * 2048 * 5632 + 2 * 2048
    assert model.num_parameters() == 128256 * 2048 + 16 * block + 2048


@pytest.mark.parametrize(("name", "millions"), [("160m", 160), ("410m", 410), ("3b", 3213), ("8b", 8030)])
def test_presets_are_the_size_they_say(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = models.LinearLlamaForCausalLM(models.LinearLlamaConfig.preset(name))
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=0.1)


# Forward and loss


def test_loss_is_the_mean_over_next_tokens() -> None:
    model, ids = small(), text()
    output = model(ids, labels=ids)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    close(output.loss, expected)
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    close(model(ids, shift_labels=shifted).loss, expected)
    close(model(ids, labels=ids, shift_labels=shifted).loss, expected)
    close(model(ids, labels=ids, num_items_in_batch=24).loss, expected / 2)


@kinds
def test_packed_documents_have_no_target_across_their_ends(kind: str) -> None:
    model, ids = small(kind), text(batch=1, length=12)
    ends = torch.tensor([0, 5, 5, 12])
    packed = model(ids, labels=ids, cu_seqlens=ends)
    first, second = model(ids[:, :5], labels=ids[:, :5]), model(ids[:, 5:], labels=ids[:, 5:])
    close(packed.logits, torch.cat((first.logits, second.logits), 1))
    close(packed.loss, (4 * first.loss + 6 * second.loss) / 10)


@kinds
def test_padding_changes_no_real_token(kind: str) -> None:
    model, ids = small(kind), text(batch=1)
    padded = torch.cat((ids[:, :1].expand(-1, 3), ids, ids[:, :2]), 1)
    mask = torch.tensor([[0] * 3 + [1] * PROMPT + [0] * 2])
    close(model(padded, attention_mask=mask).logits[:, 3:-2], model(ids).logits)
    close(model(ids, attention_mask=torch.ones_like(ids)).logits, model(ids).logits)


def test_outputs_on_request() -> None:
    model, ids = small(), text()
    whole = model(ids, output_hidden_states=True)
    assert len(whole.hidden_states) == 5
    close(model.lm_head(whole.hidden_states[-1]), whole.logits)
    # Fewer rows are another product: another order of the sums.
    close(model(ids, logits_to_keep=2).logits, whole.logits[:, -2:])
    close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, whole.logits[:, [0, 3]])
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, whole.logits)
    loss, logits = model(ids, labels=ids, use_cache=False, return_dict=False)
    assert loss.ndim == 0
    close(logits, whole.logits)  # without the final states


ONE_OF_TWO = SimpleNamespace(rank=0, size=2, layout="contiguous", channel=SimpleNamespace(check_whole=lambda: None))
HALF = lasp.Cut(ONE_OF_TWO, (PROMPT, 3))


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"labels": text(), "cut": HALF}, "shift_labels"),
        ({"labels": text(), "logits_to_keep": 1}, "logits_to_keep=1"),
        ({"inputs_embeds": torch.zeros(2, PROMPT, 32)}, "exactly one"),
        ({"attention_mask": torch.ones(2, 3)}, "\\(2, 3\\)"),
        ({"use_cache": True, "cut": HALF}, "neither cu_seqlens nor a group"),
        ({"past_key_values": models.RecurrentCache(9)}, "9 layers, the model 4"),
        ({"past_key_values": transformers.DynamicCache()}, "got DynamicCache"),
        ({"cache": models.RecurrentCache(9)}, "9 layers, the model 4"),
        ({"cache": transformers.DynamicCache()}, "got DynamicCache"),
        ({"cache": models.RecurrentCache(4), "past_key_values": models.RecurrentCache(4)}, "two names of one"),
        ({"cache": models.RecurrentCache(4), "cu_seqlens": torch.tensor([0, 7])}, "neither cu_seqlens nor a group"),
        ({"output_attentions": True}, "no attention weights"),
    ],
)
def test_mistakes_in_calling_are_value_errors(keywords: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small()(text(), **keywords)


@pytest.mark.parametrize("ids", [text().tolist(), text()[0], text().float(), text()[:0]])
def test_what_are_no_tokens(ids: Any) -> None:
    with pytest.raises(ValueError, match=r"takes input_ids \[B, T\], integers"):
        small()(ids)


def test_unknown_arguments_are_not_swallowed() -> None:
    with pytest.raises(TypeError, match="atention_mask"):
        small()(text(), atention_mask=None)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@kinds
def test_gradient_checkpointing_changes_no_gradient(kind: str) -> None:
    model, ids = small(kind).train(), text()
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
            assert model.model.layers[0].gradient_checkpointing
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_bfloat16_follows_fp64() -> None:
    model, ids = small(), text(length=40)
    model.bfloat16()
    low = model(ids).logits
    assert low.dtype == torch.bfloat16
    exact = model.double()(ids).logits
    assert (low.double() - exact).norm() < 5e-2 * exact.norm()


# Generation


@kinds
def test_states_step_by_step_equal_the_whole_forward(kind: str) -> None:
    model, ids = small(kind), text(length=PROMPT + NEW)
    whole = model(ids).logits
    cache, pieces = None, []
    for piece in ids.split([PROMPT] + [1] * NEW, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    close(torch.cat(pieces, 1), whole)
    assert cache.get_seq_length() == PROMPT + NEW


@kinds
def test_greedy_generation_equals_the_parallel_forward(kind: str) -> None:
    model, ids = small(kind), text()
    generated = model.generate(
        ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    sequences = generated.sequences
    assert torch.equal(sequences[:, :PROMPT], ids)
    parallel = model(sequences).logits[:, PROMPT - 1 : -1]
    assert torch.equal(sequences[:, PROMPT:], parallel.argmax(-1))
    close(torch.stack(generated.logits, 1), parallel.float(), 1e-5)  # generate() returns fp32
    assert generated.past_key_values.seen_tokens == PROMPT + NEW - 1


@kinds
def test_left_padded_prompts_generate_what_they_do_alone(kind: str) -> None:
    model, ids = small(kind), text()
    batch = torch.stack((ids[0], torch.cat((torch.zeros(3, dtype=torch.long), ids[1, 3:]))))
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    together = model.generate(batch, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    for row, prompt in ((together[0], ids[:1]), (together[1, 3:], ids[1:, 3:])):
        assert torch.equal(row, model.generate(prompt, max_new_tokens=NEW, do_sample=False)[0])


@kinds
def test_beam_search_reorders_the_states(kind: str) -> None:
    model, ids = small(kind), text()
    options = {"max_new_tokens": NEW, "num_beams": 3, "do_sample": False, "num_return_sequences": 2}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("kind", ["retention", "LNLN"])
def test_generation_continues_from_a_cache_in_chunks(kind: str) -> None:
    model, ids = small(kind), text()
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    options = {"max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
    fresh = models.RecurrentCache(4)
    assert torch.equal(model.generate(ids, past_key_values=fresh, prefill_chunk_size=3, **options), expected)


@pytest.mark.parametrize("kind", ["lightning", "LNLN", "mamba2"])
@pytest.mark.parametrize("name", NAMES)
def test_a_cache_continues_under_either_name(kind: str, name: str) -> None:
    """`past_key_values`, and `cache` of transformers 5.24, in the model and in the model under its head."""
    model, ids = small(kind), text()
    whole = model(ids)
    for part, result in ((model, "logits"), (model.model, "last_hidden_state")):
        before = models.RecurrentCache(4)
        part(ids[:, :4], **{name: before})
        after = part(ids[:, 4:], **{name: before})
        assert after[NAME] is before
        assert before.seen_tokens == PROMPT
        expected = whole.logits if part is model else part(ids).last_hidden_state
        close(getattr(after, result), expected[:, 4:])


def test_only_keys_and_values_grow_with_the_text() -> None:
    model = small("LLLN")
    for length in (1, 5, 50):
        *linear, softmax = model(text(length=length), use_cache=True).past_key_values.states
        assert {tuple(state.shape) for state in linear} == {(2, 4, 8, 8)}
        assert isinstance(softmax, KeyValues)
        assert softmax.k.shape == softmax.v.shape == (2, length, 4, 8)
    windowed = small("LNLN")(text(length=50), use_cache=True).past_key_values
    assert windowed.states[1].k.shape == (2, 4, 4, 8)


def test_the_cache_of_linear_layers_does_not_grow_with_the_text() -> None:
    model = small()
    sizes = set()
    for length in (1, 5, 50):
        cache = model(text(length=length), use_cache=True).past_key_values
        sizes.add(sum(state.numel() for state in cache.states))
    assert sizes == {4 * 2 * 4 * 8 * 8}
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.states == [None] * 4


def test_a_cache_is_kept_only_where_it_is_of_use() -> None:
    model, ids = small(), text(batch=1)
    assert model(ids).past_key_values is not None
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids, cu_seqlens=torch.tensor([0, 3, PROMPT])).past_key_values is None
    assert model.train()(ids).past_key_values is None


# Saving and loading


@pytest.mark.parametrize("tied", [True, False])
@kinds
def test_saving_and_loading_keeps_every_bit(kind: str, tied: bool, tmp_path: Path) -> None:
    model = small(kind, tie_word_embeddings=tied, num_key_value_heads=2).float()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    loaded = models.LinearLlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.config.layer_mixers == model.config.layer_mixers
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    # What was read may lie at another address than what was made, where a product takes other instructions.
    close(loaded(text()).logits, model(text()).logits, 1e-5)  # fp32, four layers
    assert (tmp_path / "model.safetensors").exists()


def test_auto_classes_load_after_import(tmp_path: Path) -> None:
    model = small().float()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(loaded) is models.LinearLlamaForCausalLM
    assert loaded.dtype == torch.bfloat16
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is models.LinearLlamaModel


@pytest.mark.parametrize("ids", [[3, 61, 5], [3, -1, 5]])
def test_ids_beyond_the_vocabulary_are_told_by_the_cut(ids: list[int]) -> None:
    model = small()
    batch = lasp.shard_batch({"input_ids": torch.tensor([ids])}, None)
    with pytest.raises(ValueError, match=f"input_ids must be from 0 to 60, got {ids[1]}"):
        model(**batch)


def test_a_mask_that_the_cut_batch_had_not() -> None:
    model = small()
    batch = lasp.shard_batch({"input_ids": torch.tensor([[1, 2, 3]])}, None)
    with pytest.raises(ValueError, match="the attention_mask is not of the batch that was cut"):
        model(**batch, attention_mask=torch.ones(1, 3))
