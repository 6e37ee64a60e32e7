"""Dropout by position: what it draws, and when it is drawn again."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lasp
from lasp.wrap.dropout import PER_SEED, dropout, functional
from lasp.wrap.wiring import Forward, Wiring

pytest.importorskip("transformers")

import transformers

from tests.hf_models import make_single

LENGTH = 5 * PER_SEED + 7


def dropped(parts: tuple[tuple[int, int], ...], *shape: int, p: float = 0.25) -> torch.Tensor:
    return within(parts, shape[0], torch.ones(shape), p)


def within(parts: tuple[tuple[int, int], ...], sequences: int, x: torch.Tensor, p: float) -> torch.Tensor:
    """Dropout in the forward of a model whose rank holds these parts of the sequence."""
    wiring, cut = Wiring(None, "auto", "auto", None), SimpleNamespace(parts=parts, tokens=sum(b - a for a, b in parts))
    torch.manual_seed(0)
    with wiring.within(Forward(cut, sequences)):
        return dropout(wiring, x, p, True)


@pytest.mark.parametrize(
    "parts", [((0, 1),), ((3, PER_SEED),), ((PER_SEED, 2 * PER_SEED + 1),), ((5, 70), (200, LENGTH))]
)
def test_a_part_has_the_masks_of_its_positions(parts: tuple[tuple[int, int], ...]) -> None:
    whole = dropped(((0, LENGTH),), 2, LENGTH, 8)
    tokens = torch.cat([torch.arange(*part) for part in parts])
    torch.testing.assert_close(dropped(parts, 2, len(tokens), 8), whole[:, tokens], rtol=0, atol=0)
    flat = dropped(parts, 2, len(tokens), 8).flatten(0, 1)
    torch.testing.assert_close(within(parts, 2, torch.ones(2 * len(tokens), 8), 0.25), flat, rtol=0, atol=0)


def test_masks_differ_from_token_to_token_and_keep_the_mean() -> None:
    y = dropped(((0, LENGTH),), 2, LENGTH, 64)
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (y == 0).float().mean() == pytest.approx(0.25, abs=0.01)  # of 41856, three deviations are 0.006
    assert len({tuple(row) for row in (y == 0).flatten(0, 1).tolist()}) == 2 * LENGTH


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False)])
def test_nothing_and_everything(p: float, training: bool) -> None:
    x = torch.ones(2, 3, 4)
    y = functional(Wiring(None, "auto", "auto", None), x, p, training)
    torch.testing.assert_close(y, x)
    assert not dropped(((0, 3),), 2, 3, 4, p=1.0).any()
    with pytest.raises(ValueError, match="outside of the model's forward"):  # which tokens are these?
        functional(Wiring(None, "auto", "auto", None), x, 0.5, True)


def test_shapes_without_tokens_get_masks_too() -> None:
    assert 0 < (dropped(((0, 9),), 1000) == 0).float().mean() < 1


def test_restored_and_copied() -> None:
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 4, "attn_pdrop": 0.0}
    model = lasp.parallelize(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).train(), None)
    batch = lasp.shard_batch({"input_ids": torch.arange(40)[None], "labels": torch.arange(40)[None]}, None)
    losses = []
    for each in (model, copy.deepcopy(model), model):
        torch.manual_seed(1)
        losses.append(each(**batch).loss)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])
    assert model(**batch).loss != losses[0]
    lasp.unparallelize(model)
    assert not any("forward" in vars(module) for module in model.modules() if isinstance(module, nn.Dropout))


@pytest.mark.slow
def test_a_compiled_model_drops_the_same() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = lasp.parallelize(peft.get_peft_model(make_single("llama"), lora), None).train()
    batch = lasp.shard_batch({"input_ids": torch.arange(40)[None], "labels": torch.arange(40)[None]}, None)
    compiled, losses = torch.compile(model, backend="eager"), []
    for each in (model, compiled, compiled):
        torch.manual_seed(1)
        losses.append(each(**batch).loss)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])
