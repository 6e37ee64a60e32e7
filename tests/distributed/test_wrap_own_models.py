"""`parallelize` gives the models of this package their group: losses and gradients are those of one device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lasp

pytest.importorskip("transformers")

from lasp.models import LinearLlamaConfig, LinearLlamaForCausalLM, LinearRobertaConfig, LinearRobertaForMaskedLM

GroupOf = Callable[..., lasp.SequenceGroup | None]
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
IDS = torch.randint(97, (2, 37), generator=torch.Generator().manual_seed(0))


def make(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "roberta":
        return LinearRobertaForMaskedLM(LinearRobertaConfig(**SIZES)).double()
    return LinearLlamaForCausalLM(LinearLlamaConfig(**SIZES, mixer=kind, pattern="LN")).double()


@pytest.mark.parametrize("kind", [pytest.param("gla", marks=pytest.mark.slow), "gated_deltanet", "roberta"])
def test_equal_to_one_device(group_of: GroupOf, kind: str) -> None:
    model, whole = make(kind), {"input_ids": IDS, "labels": IDS}
    plain = copy.deepcopy(model)
    expected = plain(**whole)
    expected.loss.backward()
    for size, layout in ((2, "zigzag" if kind != "roberta" else "contiguous"), (4, "contiguous")):
        group = group_of(size, layout)
        if group is None:
            continue
        own = lasp.parallelize(copy.deepcopy(model), group)
        result = own(**lasp.shard_batch(whole, group, shift=kind != "roberta"))
        result.loss.backward()
        lasp.sync_gradients(own, group)
        torch.testing.assert_close(result.loss, expected.loss, rtol=0, atol=1e-10)
        torch.testing.assert_close(lasp.unshard(result.logits.detach(), group), expected.logits.detach())
        for one, two in zip(plain.parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(two.grad, one.grad, rtol=0, atol=1e-9)
        hidden = own.base_model(input_ids=lasp.shard(IDS, group)).last_hidden_state
        torch.testing.assert_close(
            lasp.unshard(hidden.detach(), group), plain.base_model(IDS).last_hidden_state.detach()
        )
        assert lasp.verify(model, group, seq_len=41).exact
        assert lasp.verify(own, group, seq_len=41).exact
        restored = lasp.unparallelize(own)
        torch.testing.assert_close(restored(**whole).loss, expected.loss, rtol=0, atol=1e-10)


@pytest.mark.parametrize("told", ["by the configuration", "to parallelize"])
def test_how_ranks_exchange_is_chosen(group_of: GroupOf, told: str) -> None:
    model, group = make("lightnet"), group_of(2)
    expected = copy.deepcopy(model)(input_ids=IDS, labels=IDS).loss
    if group is None:
        return
    options = {"scan": "ring", "attention": "gather"}
    if told == "by the configuration":
        model = LinearLlamaForCausalLM(LinearLlamaConfig(**SIZES, mixer="lightnet", pattern="LN", **options)).double()
        model.load_state_dict(make("lightnet").state_dict())
        options = {}
    own = lasp.parallelize(model, group, **options)
    with lasp.traffic() as ledger:
        loss = own(**lasp.shard_batch({"input_ids": IDS, "labels": IDS}, group)).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    found = [record.op for record in ledger.records if record.phase == "forward"]
    assert found.count("ring") == 2, "of LightNet's stabiliser, and of its states"
    lasp.unparallelize(own)
    said = "ring" if told == "by the configuration" else "auto"
    assert {m.scan for m in own.modules() if hasattr(m, "scan")} == {said}


def test_what_is_refused(group_of: GroupOf) -> None:
    group, model = group_of(4), make("gla")
    assert group is not None
    for options in ({"attention": "star"}, {"scan": "star"}):
        with pytest.raises(ValueError, match=r"must be one of auto, .* got 'star'"):
            lasp.parallelize(copy.deepcopy(model), group, **options)
    foreign = copy.deepcopy(model)
    foreign.model.layers[0].mlp = torch.nn.Conv1d(32, 32, 3)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp \(Conv1d\)"):
        lasp.parallelize(foreign, group)
    own = lasp.parallelize(model, group)
    batch = lasp.shard_batch({"input_ids": IDS, "labels": IDS}, group)
    with pytest.raises(ValueError, match="over another group"):
        own(**batch, group=group_of(4, "zigzag"))
    with pytest.raises(ValueError, match="cut over another group"):
        own(**lasp.shard_batch({"input_ids": IDS, "labels": IDS}, group_of(4, "zigzag")))
    own(**batch, group=group)
    with pytest.raises(ValueError, match="unparallelize to generate"):
        own.generate(IDS)
    with pytest.raises(ValueError, match="labels without shift_labels"):
        own(lasp.shard(IDS, group), labels=lasp.shard(IDS, group))
    del batch["cut"]  # with one, a rank that changed its model is on its own
    if group.rank == 1:
        own.model.layers[1] = copy.deepcopy(own.model.layers[1])
    with pytest.raises(ValueError, match=r"joined since lasp\.parallelize.*rank 1 of 4"):
        own(**batch)
