"""Forwards of several batches before their backward, checkpointed: every layer that is repeated sees its own batch."""

from __future__ import annotations

import copy
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lasp

pytest.importorskip("transformers")

from lasp.models import LinearLlamaConfig, LinearLlamaForCausalLM
from tests import fla_stub
from tests.hf_models import VOCABULARY, make

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(200)]
GroupOf = Callable[..., lasp.SequenceGroup | None]
FAMILIES = ["llama", "qwen3_5", "bamba", "mamba", "retnet", "own"]
BOUNDS = [0, 5, 17, 17, 41]


def model_of(family: str) -> Any:
    if family == "retnet":
        return fla_stub.make(fla_stub.RetNetForCausalLM)
    if family != "own":
        return make(family)
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LinearLlamaConfig(
        **sizes, num_hidden_layers=3, mixer="gated_deltanet", pattern=["retention", "softmax", "gla"]
    )
    return LinearLlamaForCausalLM(config).double()


def batches() -> list[dict[str, Tensor]]:
    """One that is packed, and one of another length that is not."""
    rng = torch.Generator().manual_seed(2)
    packed, plain = (torch.randint(3, VOCABULARY, (1, n), generator=rng) for n in (41, 30))
    return [
        {"input_ids": packed, "labels": packed, "cu_seqlens": torch.tensor(BOUNDS)},
        {"input_ids": plain, "labels": plain},
    ]


def gradients(losses: list[Tensor], model: Any, weights: tuple[float, float] = (1.0, -0.4)) -> dict[str, Tensor]:
    sum(weight * loss for weight, loss in zip(weights, losses, strict=True)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def one_by_one(model: Any, group: lasp.SequenceGroup | None) -> dict[str, Tensor]:
    """Backward after each forward, without checkpoints, on one device."""
    model = lasp.parallelize(copy.deepcopy(model), group)
    for weight, batch in zip((1.0, -0.4), batches(), strict=True):
        (weight * model(**lasp.shard_batch(batch, group)).loss).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_forwards_and_one_backward(group_of: GroupOf, family: str, reentrant: bool) -> None:
    model = model_of(family).train()
    theirs = one_by_one(model, None)
    for size, layout in ((2, "contiguous"), (4, "zigzag")):
        if (group := group_of(size, layout)) is None:
            continue
        own = lasp.parallelize(copy.deepcopy(model), group)
        if hasattr(own, "gradient_checkpointing_enable") and getattr(own, "supports_gradient_checkpointing", False):
            own.gradient_checkpointing_enable({"use_reentrant": reentrant})
        losses = [own(**lasp.shard_batch(batch, group)).loss for batch in batches()]
        ours = gradients(losses, own)
        lasp.sync_gradients(own, group)
        assert ours.keys() == theirs.keys()
        for name, grad in theirs.items():
            torch.testing.assert_close(own.get_parameter(name).grad, grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_two_models_take_turns(group_of: GroupOf, family: str) -> None:
    if (group := group_of(2)) is None:
        return
    models = [model_of(family), model_of("retnet")]
    theirs = [one_by_one(model, None) for model in models]
    own = [lasp.parallelize(copy.deepcopy(model), group) for model in models]
    losses: list[list[Tensor]] = [[], []]
    for batch in batches():
        cut = lasp.shard_batch(batch, group)
        for model, found in zip(own, losses, strict=True):
            model.gradient_checkpointing_enable({"use_reentrant": False})
            found.append(model(**cut).loss)
    for model, found, expected in zip(own, losses, theirs, strict=True):
        gradients(found, model)
        lasp.sync_gradients(model, group)
        for name, grad in expected.items():
            torch.testing.assert_close(model.get_parameter(name).grad, grad, rtol=0, atol=1e-9)


def test_threads_have_batches_of_their_own() -> None:
    """One device: two threads share a process's order of calls over ranks, and it is that which is undefined."""
    model = lasp.parallelize(make("mamba"), None)
    alone = [model(**lasp.shard_batch(batch, None)).loss.item() for batch in batches()]
    found: dict[int, list[float]] = {0: [], 1: []}

    def run(place: int) -> None:
        for _ in range(5):
            found[place].append(model(**lasp.shard_batch(batches()[place], None)).loss.item())

    threads = [threading.Thread(target=run, args=(place,)) for place in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, losses in found.items():
        assert losses == pytest.approx([alone[place]] * 5, rel=1e-12)


def test_a_checkpoint_that_is_not_known_is_refused(group_of: GroupOf) -> None:
    """Its second computation of a layer would know neither documents nor positions."""
    from torch.distributed._composable import checkpoint

    if group_of(2) is None:
        return
    model = lasp.parallelize(make("llama").train(), None)
    for layer in model.model.layers:
        checkpoint(layer)
    loss = model(**lasp.shard_batch(batches()[0], None)).loss
    with pytest.raises(ValueError, match="by a checkpoint of activations that lasp does not know"):
        loss.backward()


# What a step costs --------------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts what comes back from tensors to Python in code of lasp's."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_local_scalar_dense" in str(function) and (place := reader()):
            self.found.append(place)
        return function(*args, **(kwargs or {}))


def reader() -> str | None:
    """Which line of lasp reads, where it is lasp that does: the innermost frame but for torch's."""
    frame = sys._getframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if f"{os.sep}torch{os.sep}" not in path and "test_two_batches" not in path:
            return f"{path}:{frame.f_lineno}" if path.startswith(ROOT) else None
        frame = frame.f_back
    return None


ROOT = os.path.dirname(lasp.__file__) + os.sep


@contextmanager
def no_lists() -> Iterator[list[str]]:
    """Counts `tolist` and `numpy` as `Reads` does, which torch answers without its dispatcher."""
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "numpy", "item", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name), found))
        yield found


def counted(original: Callable[..., Any], found: list[str]) -> Callable[..., Any]:
    def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if place := reader():
            found.append(place)
        return original(self, *args, **kwargs)

    return call


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("size", "layout"), [(2, "zigzag"), (4, "contiguous")])
@pytest.mark.parametrize("family", ["llama", "qwen3_5", "mamba", "own"])
def test_a_step_has_one_header_and_reads_nothing_back(
    group_of: GroupOf, family: str, size: int, layout: str, packed: bool
) -> None:
    if (group := group_of(size, layout)) is None:
        return
    model = lasp.parallelize(model_of(family).train(), group)
    with lasp.traffic() as ledger:
        batch = lasp.shard_batch(batches()[0 if packed else 1], group)
        with no_lists() as lists, Reads() as reads:
            model(**batch).loss.backward()
    assert [(record.op, record.steps) for record in ledger.of("control")] == [("all_gather", 1)]
    assert reads.found == []
    assert lists == []
