"""Layers that call what those of flash-linear-attention call: equal to one device, on stubs, in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import lasp

pytest.importorskip("transformers")

from tests.fla_stub import MODELS, KDAForCausalLM, Model, make

GroupOf = Callable[..., lasp.SequenceGroup | None]
IDS = torch.randint(97, (1, 61), generator=torch.Generator().manual_seed(1))


def on_one_device(model: Model, bounds: list[int]) -> Tensor:
    """The loss, every document by itself."""
    logits = [model(IDS[:, a:b]).logits[:, :-1] for a, b in pairwise(bounds)]
    targets = [IDS[:, a + 1 : b] for a, b in pairwise(bounds)]
    return lasp.cross_entropy(torch.cat(logits, 1), torch.cat(targets, 1))


@pytest.mark.parametrize("bounds", [pytest.param([0, 61], marks=pytest.mark.slow), [0, 13, 30, 61]])
@pytest.mark.parametrize("cls", MODELS)
def test_equals_one_device(group_of: GroupOf, cls: type[Model], bounds: list[int]) -> None:
    model = make(cls)
    reference = copy.deepcopy(model)
    theirs = on_one_device(reference, bounds)
    theirs.backward()
    for size, layout in ((2, "zigzag"), (4, "contiguous")):
        group = group_of(size, layout)
        if group is None:
            continue
        own = lasp.parallelize(copy.deepcopy(model), group)
        packed = {"cu_seqlens": torch.tensor(bounds)} if len(bounds) > 2 else {}
        ours = own(**lasp.shard_batch({"input_ids": IDS, "labels": IDS, **packed}, group)).loss
        ours.backward()
        lasp.sync_gradients(own, group)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
        for (name, p), expected in zip(own.named_parameters(), reference.parameters(), strict=True):
            assert (p.grad is None) == (expected.grad is None), name
            if expected.grad is not None:
                torch.testing.assert_close(p.grad, expected.grad, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_verified_with_bounded_gates(group_of: GroupOf) -> None:
    model = make(KDAForCausalLM)
    model.attn.lower_bound = -5.0
    assert lasp.verify(model, group_of(4), seq_len=41).exact
