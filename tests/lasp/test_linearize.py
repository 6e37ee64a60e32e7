"""Softmax models turned into linear ones: layers against their formulas, generation, folders, and what is refused."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import lasp

pytest.importorskip("transformers")

from lasp.linearize.attention import Linearized
from lasp.linearize.cache import StateLayer
from lasp.linearize.convert import choose_layers, forget, learn
from lasp.linearize.methods import FAST, Lolcats
from tests.hf_models import VOCABULARY, make, make_single

METHODS = ("liger", "lolcats")
WINDOW = 5


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def shaken(model: Any) -> Any:
    """With feature maps and window factors that are none of those it begins with."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".linearized." in name:
            parameter.data += torch.randn_like(parameter)
    return model


# The formulas, token by token ---------------------------------------------------------------------------------------


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos[:, :, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, :, None]


def liger(q: Tensor, k: Tensor, v: Tensor, turned_q: Tensor, turned_k: Tensor, scale: float) -> Tensor:
    """One head: q, k, v [T, D]."""
    state, outputs = q.new_zeros(q.shape[1], v.shape[1]), []
    for t in range(len(q)):
        gate = torch.sigmoid(k[t]) ** (1 / 16)
        state = gate[:, None] * state + torch.outer(k[t].softmax(-1), v[t])
        near = slice(max(0, t - WINDOW + 1), t + 1)
        weights = (scale * turned_k[near] @ turned_q[t]).softmax(-1)
        outputs.append(0.5 * (q[t].softmax(-1) @ state) + 0.5 * (weights @ v[near]))
    return torch.stack(outputs)


def lolcats(q: Tensor, k: Tensor, v: Tensor, scale: float, maps: tuple[Tensor, Tensor], factor: Tensor) -> Tensor:
    """One head: q, k, v [T, D], q and k turned."""

    def features(x: Tensor, weight: Tensor) -> Tensor:
        x = x @ weight
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1).clamp(min=1e-12)

    phi_q, phi_k, outputs = features(q, maps[0]), features(k, maps[1]), []
    for t in range(len(q)):
        first = max(0, t - WINDOW + 1)
        scores = scale * k[first : t + 1] @ q[t]
        near = factor * (scores - scores.max()).exp()
        weights = torch.cat([phi_k[:first] @ phi_q[t], near])
        outputs.append(weights @ v[: t + 1] / weights.sum())
    return torch.stack(outputs)


def literal(module: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads, size = module.config.num_attention_heads, module.head_dim
    q, k, v = (p(hidden).unflatten(-1, (-1, size)) for p in (module.q_proj, module.k_proj, module.v_proj))
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    tq, tk = turned(q, cos, sin), turned(k, cos, sin)
    mixer, rows = module.linearized, []
    for row in range(len(hidden)):
        found = []
        for head in range(heads):
            other = head * k.shape[2] // heads
            if type(mixer).__name__ == "Liger":
                parts = (q[row, :, head], k[row, :, other], v[row, :, other], tq[row, :, head], tk[row, :, other])
                found.append(liger(*parts, module.scaling))
                continue
            maps = (mixer.q_features.weight[head], mixer.k_features.weight[head])
            factor = torch.sigmoid(mixer.window_logit[head])
            parts = (tq[row, :, head], tk[row, :, other], v[row, :, other])
            found.append(lolcats(*parts, module.scaling, maps, factor))
        rows.append(torch.cat(found, -1))
    return module.o_proj(torch.stack(rows))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_is_its_formula(method: str, family: str) -> None:
    model = shaken(lasp.linearize(make(family), method, window=WINDOW))
    seen: dict[str, Any] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
        seen[module.layer_idx] = (module, kwargs["hidden_states"], *kwargs["position_embeddings"], output[0])

    for module in model.modules():
        if isinstance(module, Linearized):
            module.register_forward_hook(note, with_kwargs=True)
    model(tokens(2, 17))
    assert len(seen) == 2
    for module, hidden, cos, sin, output in seen.values():
        assert (literal(module, hidden, cos, sin) - output).abs().max() < 1e-12


# Generation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["all", [1]])
@pytest.mark.parametrize("method", METHODS)
def test_generation_is_the_parallel_forward(method: str, layers: Any) -> None:
    """Of a batch with padding, by layers that keep a state alone and beside one that keeps keys and values."""
    model = shaken(lasp.linearize(make("mistral").eval(), method, layers=layers, window=WINDOW))
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    ids = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None)
    mask = torch.cat([mask, mask.new_ones(2, 9)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, steps = None, []
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for first, stop in pairwise((0, 7, *range(11, 21))):
            given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, first:stop]}
            step = model(ids[:, first:stop], past_key_values=cache, use_cache=True, **given)
            cache = step.past_key_values
            steps.append(step.logits)
    assert (torch.cat(steps, 1) - logits)[mask.bool()].abs().max() < 1e-10
    assert torch.equal(ids[:, 11:], logits[:, 10:-1].argmax(-1)), "what generate() took"
    kept = [sum(x.numel() for x in tree_leaves(layer.state)) for layer in cache.layers if isinstance(layer, StateLayer)]
    model(ids[:, -1:], past_key_values=cache)
    assert kept == [
        sum(x.numel() for x in tree_leaves(layer.state)) for layer in cache.layers if isinstance(layer, StateLayer)
    ], "of constant size"


def test_beams_and_half_of_the_layers() -> None:
    model = lasp.linearize(make_single("llama").eval(), "lolcats", layers="1/2", window=WINDOW)
    assert [isinstance(layer.self_attn, Linearized) for layer in model.model.layers] == [True, False]
    found = model.generate(tokens(2, 11), max_new_tokens=5, num_beams=3, do_sample=False, eos_token_id=None)
    assert found.shape == (2, 16)


# Folders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_is_read_back(method: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = shaken(lasp.linearize(make_single("qwen3").eval(), method, layers=[1], window=WINDOW))
    model.save_pretrained(tmp_path)
    again = lasp.linearize(tmp_path).eval()
    assert type(again) is type(model)
    assert torch.equal(again(tokens(1, 9)).logits, model(tokens(1, 9)).logits)
    with pytest.raises(ValueError, match="read its folder by"):
        lasp.parallelize(AutoModelForCausalLM.from_pretrained(tmp_path), None)


def test_adapters() -> None:
    peft = pytest.importorskip("peft")
    model = lasp.linearize(make_single("llama"), "liger", window=WINDOW)
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = lasp.parallelize(peft.get_peft_model(model, config), None)
    adapted(**lasp.shard_batch({"input_ids": tokens(1, 9), "labels": tokens(1, 9)}, None)).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert any("k_proj" in name for name in trained)


# Over a group, here of one rank -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_documents_are_apart(method: str) -> None:
    model = shaken(lasp.linearize(make("llama"), method, window=WINDOW))
    ids, bounds = tokens(1, 20), [0, 7, 8, 20]
    with torch.no_grad():
        expected = torch.cat([model(ids[:, a:b]).logits for a, b in pairwise(bounds)], 1)
        batch = lasp.shard_batch({"input_ids": ids, "cu_seqlens": torch.tensor(bounds)}, None)
        found = lasp.parallelize(copy.deepcopy(model), None)(**batch).logits
    assert (found - expected).abs().max() < 1e-12
    restarting = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])[None]
    with pytest.raises(ValueError, match="position_ids restart"):
        model(ids, position_ids=restarting)


def test_learning_passes_the_softmax_layers_output_on() -> None:
    plain = make("mistral").eval()
    model = lasp.parallelize(lasp.linearize(copy.deepcopy(plain), "lolcats", window=WINDOW), None)
    batch = lasp.shard_batch({"input_ids": tokens(2, 19)}, None)
    errors = learn(model)
    found = model(**batch).logits
    assert (found - plain(tokens(2, 19)).logits).abs().max() < 1e-12
    assert sorted(errors.squares) == [0, 1]
    sum(errors.squares.values()).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if ".linearized." in name
    }
    forget(model)
    assert (model(**batch).logits - found).abs().max() > 1e-3


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("gemma2", "its forward has attn_logit_softcapping, softcap"),
        ("gpt_oss", "its forward has s_aux, sinks"),
        ("deepseek_v3", "kv_a_proj_with_mqa"),
        ("gpt2", "is_cross_attention"),
        ("mamba2", "no softmax layers"),
    ],
)
def test_layers_that_are_not_plain(family: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        lasp.linearize(make_single(family), "lolcats")


def test_wrong_arguments() -> None:
    model = make_single("llama")
    for method, options, told in (
        ("ligre", {}, "did you mean 'liger'"),
        ("liger", {"windw": 3}, "liger knows no windw"),
        ("liger", {"window": 0}, "window must be a whole number"),
        ("liger", {"layers": "3/2"}, "layers must be"),
        ("liger", {"layers": [7]}, r"layers \[7\] are no softmax layers"),
    ):
        with pytest.raises(ValueError, match=told):
            lasp.linearize(model, method, **options)
    model.model.layers[1].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"layer 1 .LlamaAttention. has attention_dropout 0.1"):
        lasp.linearize(model, "liger")
    assert not any(isinstance(module, Linearized) for module in model.modules())
    lasp.linearize(model, "liger", layers=[0])
    with pytest.raises(ValueError, match="linearised already"):
        lasp.linearize(model, "liger")
    assert choose_layers("3/4", list(range(8))) == [0, 1, 2, 4, 5, 6]


def test_what_learns_faster_is_there() -> None:
    assert FAST.keys() <= dict(Lolcats(2, 1, 8).named_parameters()).keys()
