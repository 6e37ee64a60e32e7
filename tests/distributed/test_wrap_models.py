"""Hugging Face models: loss, logits and every gradient equal those of one device, for every family."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import lasp

pytest.importorskip("transformers")

from tests.hf_models import FAMILIES, VOCABULARY, kinds, make

GroupOf = Callable[..., lasp.SequenceGroup | None]
# Both sizes and both layouts always; the other two pairs with the slow tests.
CUTS = [
    [(2, "zigzag"), (4, "contiguous")],
    pytest.param([(2, "contiguous"), (4, "zigzag")], marks=pytest.mark.slow),
]


class Run(NamedTuple):
    """What one training step makes: loss, logits [B, N, vocabulary] and gradients by name."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]


def options_of(model: Any) -> dict[str, Any]:
    """The balance of the routers joins the loss where a model has one."""
    return {"output_router_logits": True} if hasattr(model.config, "output_router_logits") else {}


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def on_one_device(model: Any, batch: dict[str, Tensor], labels: Tensor, bounds: list[int] | None = None) -> Run:
    """transformers alone, every document by itself, with a loss in fp64."""
    parameters = inspect.signature(type(model).forward).parameters
    keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    cache = {"use_cache": False} if "use_cache" in parameters or keyword else {}
    pieces = [(0, labels.shape[1])] if bounds is None else [(a, b) for a, b in pairwise(bounds) if a < b]
    results = [model(**{k: x[:, a:b] for k, x in batch.items()}, **cache, **options_of(model)) for a, b in pieces]
    targets = [torch.nn.functional.pad(labels[:, a + 1 : b], (0, 1), value=-100) for a, b in pieces]
    logits = torch.cat([result.logits for result in results], 1)
    loss = lasp.cross_entropy(logits, torch.cat(targets, 1))
    balance = getattr(results[0], "aux_loss", None)
    if bounds is None and balance is not None:
        loss = loss + model.config.router_aux_loss_coef * balance
    loss.backward()
    return Run(loss.detach(), logits.detach(), gradients(model))


def on_ranks(
    model: Any, batch: dict[str, Tensor], labels: Tensor, group: lasp.SequenceGroup, bounds: list[int] | None = None
) -> Run:
    whole: dict[str, Tensor] = batch | {"labels": labels}
    if bounds is not None:
        whole["cu_seqlens"] = torch.tensor(bounds)
    balance = {} if bounds is not None else options_of(model)
    result = model(**lasp.shard_batch(whole, group), **balance)
    result.loss.backward()
    lasp.sync_gradients(model, group)
    return Run(result.loss.detach(), lasp.unshard(result.logits.detach(), group), gradients(model))


def assert_equal(ours: Run, theirs: Run, seen: Tensor | None = None) -> None:
    shown = torch.ones(ours.logits.shape[:2], dtype=torch.bool) if seen is None else seen.bool()
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=0, atol=1e-10)
    torch.testing.assert_close(ours.logits[shown], theirs.logits[shown], rtol=0, atol=1e-9)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_one_device(group_of: GroupOf, once, name: str, cuts: list[tuple[int, str]]) -> None:
    model, ids = make(name), tokens(2, 37)
    theirs = once(on_one_device, copy.deepcopy(model), {"input_ids": ids}, ids)
    for size, layout in cuts:
        group = group_of(size, layout)
        if group is not None:
            own = lasp.parallelize(copy.deepcopy(model), group)
            assert_equal(on_ranks(own, {"input_ids": ids}, ids, group), theirs)


# Families that have a recurrence or a convolution of each kind.
KINDS = kinds()
DOCUMENTS = ["mistral", "nemotron_h", *(name for name in KINDS if name != "xlstm")]


@pytest.mark.parametrize("layout", ["contiguous", pytest.param("zigzag", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KINDS)
def test_shards_shorter_than_the_kernel(group_of: GroupOf, once, name: str, layout: str) -> None:
    group, model, ids = group_of(4, layout), make(name), tokens(2, 9)
    assert group is not None
    theirs = once(on_one_device, copy.deepcopy(model), {"input_ids": ids}, ids)
    assert_equal(on_ranks(lasp.parallelize(model, group), {"input_ids": ids}, ids, group), theirs)


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["llama", "qwen3_5", "kimi_linear", "bamba", "mamba", "minimax", "zaya", "qwen3_moe"])
def test_padding(group_of: GroupOf, once, name: str, side: str) -> None:
    group, model, ids = group_of(4, "zigzag"), make(name), tokens(2, 37)
    assert group is not None
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[0, slice(11) if side == "left" else slice(26, None)] = 0
    labels[0, slice(12) if side == "left" else slice(26, None)] = -100  # nothing is predicted from padding
    batch = {"input_ids": ids, "attention_mask": mask}
    theirs = once(on_one_device, copy.deepcopy(model), batch, labels)
    assert_equal(on_ranks(lasp.parallelize(model, group), batch, labels, group), theirs, mask)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_are_isolated(group_of: GroupOf, once, name: str) -> None:
    bounds, ids, model = [0, 1, 10, 10, 31, 37], tokens(1, 37), make(name)
    theirs = once(on_one_device, copy.deepcopy(model), {"input_ids": ids}, ids, bounds)
    for size, layout in ((2, "contiguous"), (4, "zigzag")):
        group = group_of(size, layout)
        if group is not None:
            own = lasp.parallelize(copy.deepcopy(model), group)
            assert_equal(on_ranks(own, {"input_ids": ids}, ids, group, bounds), theirs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "name", ["qwen3_5", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bamba", "recurrent_gemma"))]
)
def test_checkpointing(group_of: GroupOf, once, name: str, reentrant: bool) -> None:
    group, model, ids = group_of(4, "contiguous"), make(name), tokens(2, 37)
    assert group is not None
    theirs = once(on_one_device, copy.deepcopy(model), {"input_ids": ids}, ids)
    own = lasp.parallelize(model, group)
    own.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_equal(on_ranks(own, {"input_ids": ids}, ids, group), theirs)


@pytest.mark.parametrize(("rank", "wrong"), [(0, VOCABULARY), (1, -1), (3, -100), (2, 10**9)])
def test_ids_beyond_the_vocabulary_are_refused_by_all(world, group_of: GroupOf, rank: int, wrong: int) -> None:
    group, ids = group_of(4, "contiguous"), tokens(1, 16)
    assert group is not None
    model = lasp.parallelize(make("llama"), group)
    ids[0, 4 * rank + 1] = wrong
    with pytest.raises(ValueError, match=rf"must be from 0 to {VOCABULARY - 1}, got {wrong}$"):
        model(**lasp.shard_batch({"input_ids": ids}, group))
