"""What one rank changed after `parallelize` is an error on all; the base model by itself is that of the whole."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lasp

pytest.importorskip("transformers")

from tests.hf_models import make, make_single

GroupOf = Callable[..., lasp.SequenceGroup | None]
IDS = torch.randint(97, (2, 37), generator=torch.Generator().manual_seed(0))


def set_attention(model: Any) -> None:
    model.set_attn_implementation("sdpa")


def set_loss(model: Any) -> None:
    model.loss_function = F.cross_entropy


def set_forward(model: Any) -> None:
    model.model.layers[0].mlp.forward = lambda x: x


def replace_layer(model: Any) -> None:
    model.model.layers[0] = copy.deepcopy(model.model.layers[0])


def without_cut(batch: dict[str, Any], group: lasp.SequenceGroup) -> dict[str, Any]:
    """A batch on which the ranks have yet to agree, in the model's forward; with a cut a rank is on its own there."""
    cut = lasp.shard_batch(batch, group)
    del cut["cut"]
    return cut


@pytest.mark.parametrize("change", [set_attention, set_loss, set_forward, replace_layer])
def test_one_rank_that_changed_its_model(group_of: GroupOf, change: Callable[[Any], None]) -> None:
    group = group_of(4)
    assert group is not None
    model = lasp.parallelize(make_single("llama"), group)
    batch = without_cut({"input_ids": IDS, "labels": IDS}, group)
    if group.rank == 2:
        change(model)
    with pytest.raises(ValueError, match=r"(since lasp\.parallelize|not that of its class).*\(rank 2 of 4\)"):
        model(**batch)


@pytest.mark.parametrize("change", [set_attention, set_loss])
def test_with_a_cut_every_rank_finds_it_by_itself(group_of: GroupOf, change: Callable[[Any], None]) -> None:
    group = group_of(4)
    assert group is not None
    model = lasp.parallelize(make_single("llama"), group)
    change(model)
    with pytest.raises(ValueError, match=r"since lasp\.parallelize"):
        model(**lasp.shard_batch({"input_ids": IDS, "labels": IDS}, group))


def test_a_forward_that_does_not_come_to_the_loss(group_of: GroupOf, monkeypatch: pytest.MonkeyPatch) -> None:
    group = group_of(4)
    assert group is not None
    model = lasp.parallelize(make_single("llama"), group)
    monkeypatch.setattr(type(model), "loss_function", lambda *_, **__: torch.zeros(()))
    with pytest.raises(ValueError, match="did not call its loss_function"):
        model(**lasp.shard_batch({"input_ids": IDS, "labels": IDS}, group))


def test_tokens_that_are_put_in(group_of: GroupOf) -> None:
    group = group_of(4)
    assert group is not None
    model = lasp.parallelize(make_single("mamba2"), group)
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, x: F.pad(x, (0, 0, 2, 0)))
    with pytest.raises(ValueError, match=r"is given 1[12] tokens of this rank's (9|10)"):
        model(**lasp.shard_batch({"input_ids": IDS}, group))


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, KeyboardInterrupt])
def test_what_ends_a_forward_on_one_rank_is_told(group_of: GroupOf, kind: type[BaseException]) -> None:
    """At the next header; the group works afterwards."""
    group = group_of(4)
    assert group is not None
    model = lasp.parallelize(make_single("llama"), group)
    batch = lasp.shard_batch({"input_ids": IDS}, group)

    def fail(*_: Any) -> None:
        raise kind("a hook")

    hook = model.lm_head.register_forward_hook(fail) if group.rank == 1 else None
    if hook:
        with pytest.raises(kind, match="a hook"):
            model(**batch)
        hook.remove()
    else:
        model(**batch)  # nothing is exchanged behind the last layer
        told = re.escape(f"the forward of LlamaForCausalLM ended by {kind.__name__}: a hook (rank 1 of 4)")
        with pytest.raises(ValueError, match=told):
            group.cut(37)
    assert model(**lasp.shard_batch({"input_ids": IDS, "labels": IDS}, group)).loss.isfinite()


def test_generate_on_one_rank_is_told(group_of: GroupOf) -> None:
    group = group_of(4)
    assert group is not None
    model = lasp.parallelize(make_single("llama"), group)
    batch = without_cut({"input_ids": IDS}, group)
    with pytest.raises(ValueError, match=r"call lasp\.unparallelize to generate"):
        model.generate(IDS) if group.rank == 3 else model(**batch)


@pytest.mark.parametrize("difference", ["class", "attention", "shape", "refused"])
def test_ranks_that_do_not_parallelise_the_same(group_of: GroupOf, difference: str) -> None:
    group = group_of(4)
    assert group is not None
    mine, name = group.rank == 1, "llama"
    model = make_single("qwen3" if difference == "class" and mine else name)
    if difference == "shape" and mine:
        model.resize_token_embeddings(104, mean_resizing=False)
    if difference == "refused" and mine:
        model.loss_function = F.cross_entropy
    options: Any = {"attention": "ring"} if difference == "attention" and mine else {}
    with pytest.raises(ValueError, match=r"ranks disagree on|loss_function of its own"):
        lasp.parallelize(model, group, **options)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", ["llama", "qwen3_5", "mamba"])
def test_the_base_model_by_itself(group_of: GroupOf, name: str, layout: str) -> None:
    """With a value head on top: its output, and every gradient."""
    model = make(name)
    for size in (2, 4):
        group = group_of(size, layout)
        if group is None:
            continue
        plain, own = copy.deepcopy(model), lasp.parallelize(copy.deepcopy(model), group)
        expected = plain.base_model(IDS, use_cache=False).last_hidden_state
        hidden = own.base_model(input_ids=lasp.shard(IDS, group)).last_hidden_state
        torch.testing.assert_close(lasp.unshard(hidden.detach(), group), expected.detach(), rtol=0, atol=1e-9)
        expected.square().sum().backward()
        hidden.square().sum().backward()
        lasp.sync_gradients(own.base_model, group)
        for one, two in zip(plain.base_model.parameters(), own.base_model.parameters(), strict=True):
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-9, atol=1e-9)
