"""Softmax attention compiled, without values, and recomputed in part: as it is otherwise."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lasp
from tests.attention import largest_error, make_attention, solve_attention

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 5, "sinks": True},
    "capped": {"softcap": 2.0, "key_mask": True},
    "documents": {"cu_seqlens": (0, 5, 20)},
}


@pytest.mark.parametrize("name", ["plain", pytest.param("capped", marks=pytest.mark.slow)])
def test_compiled_for_several_lengths(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lasp.softmax_attention, backend="aot_eager")
    for length in (20, 33, 47):
        problem = make_attention(length, **OPTIONS[name])
        expected = solve_attention(problem, lasp.softmax_attention)
        assert largest_error(solve_attention(problem, compiled), expected) < 1e-12


@pytest.mark.parametrize("scale", [0.0, -1.5])
@pytest.mark.parametrize("name", [*OPTIONS, "unmasked"])
def test_scales_that_are_not_positive(name: str, scale: float) -> None:
    problem = make_attention(20, **OPTIONS.get(name, {"causal": False}), scale=scale)
    assert largest_error(solve_attention(problem, lasp.softmax_attention), solve_attention(problem)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_to_machine_code(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lasp.softmax_attention, backend="inductor")
    for length in (20,) if name == "documents" else (20, 33):
        problem = make_attention(length, **OPTIONS[name])
        expected = solve_attention(problem, lasp.softmax_attention)
        assert largest_error(solve_attention(problem, compiled), expected) < 1e-12


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("name", OPTIONS)
def test_tensors_without_values(name: str, kind: str) -> None:
    """Outputs and gradients of the shapes and dtypes of those with values."""
    problem = make_attention(20, **OPTIONS[name], dtype=torch.bfloat16)
    expected = solve_attention(problem, lasp.softmax_attention)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = {**problem.inputs, "grad": problem.grad, "key_mask": problem.key_mask}
        given: dict[str, Tensor] = {
            key: mode.from_tensor(x) if kind == "fake" else x.to("meta") for key, x in inputs.items() if x is not None
        }
        own = [given[key].requires_grad_() for key in problem.inputs]
        grad = given.pop("grad")
        output = lasp.softmax_attention(**given, **problem.options)
        found = (output, *torch.autograd.grad(output, own, grad))
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected.values()]


@pytest.mark.parametrize("saved", ["mm", "flash"], ids=["products", "attention"])
@pytest.mark.parametrize("name", OPTIONS)
def test_selective_checkpointing(name: str, saved: str) -> None:
    """Some results are kept for the way back, and the rest is computed again."""

    def policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if saved in str(operator) else CheckpointPolicy.PREFER_RECOMPUTE

    def attention(**arguments: Any) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(lasp.softmax_attention, use_reentrant=False, context_fn=contexts, **arguments)

    problem = make_attention(20, **OPTIONS[name])
    expected = solve_attention(problem, lasp.softmax_attention)
    assert largest_error(solve_attention(problem, attention), expected) < 1e-12
