"""torch.compile of parallelised models: every call, of any length and mode, equals the model without it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import lasp

pytest.importorskip("transformers")

from tests.hf_models import make_single

pytestmark = pytest.mark.timeout(180)  # the compiler takes its time on a busy machine


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def assert_steps_equal(compiled: Any, own: Any, plain: Any, lengths: tuple[int, ...]) -> None:
    """Training steps, and the last in evaluation. `own` holds the parameters of `compiled`."""
    for i, length in enumerate(lengths):
        for model in (own, plain):
            model.train(i + 1 < len(lengths)).zero_grad()
        ids = torch.arange(2 * length).reshape(2, length) % 97
        batch = lasp.shard_batch({"input_ids": ids, "labels": ids}, None)
        result, expected = compiled(**batch), plain(**batch)
        torch.testing.assert_close(result.logits, expected.logits)
        torch.testing.assert_close(result.loss, expected.loss)
        result.loss.backward()
        expected.loss.backward()
        for ours, theirs in zip(own.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


FIRST, MORE = (20, 20), (20, 20, 20, 13, 31)


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.timeout(300)])


@pytest.mark.parametrize(
    ("name", "backend", "lengths"),
    [
        ("llama", "eager", FIRST),
        ("mamba2", "eager", FIRST),
        slow("qwen3_5", "eager", MORE),
        *(
            slow(name, backend, MORE)
            for name in ("llama", "qwen3_5", "mamba2")
            for backend in ("aot_eager", "inductor")
        ),
    ],
)
def test_every_call_equals_eager(name: str, backend: str, lengths: tuple[int, ...]) -> None:
    plain = lasp.parallelize(make_single(name), None)
    own = copy.deepcopy(plain)
    graphs = 0

    def counting(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(own, backend=counting)
    assert_steps_equal(compiled, own, plain, lengths)
    assert graphs >= 4  # embeddings, what lies around the mixers, the head


def test_in_place_a_second_model_of_the_class_and_a_change() -> None:
    for _ in range(2):
        plain = lasp.parallelize(make_single("llama"), None)
        own = copy.deepcopy(plain)
        own.compile(backend="eager")
        assert_steps_equal(own, own, plain, FIRST)
    own.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attention was set to sdpa"):
        own(input_ids=torch.arange(20)[None])
