"""The specification takes what the fast path takes."""

from __future__ import annotations

import pytest
import torch

import lasp
from lasp.functional.logcumsumexp import logcumsumexp
from lasp.kernels import reference
from tests.attention import largest_error


@pytest.mark.parametrize("operation", ["linear_attention", "delta_rule"])
@pytest.mark.parametrize("heads", [(2, 2, 2, 4), (1, 1, 1, 3), (2, 1, 2, 6), (4, 1, 2, 2)], ids=str)
def test_initial_states_of_more_heads(operation: str, heads: tuple[int, int, int, int]) -> None:
    """heads: of q, k, v and the initial state, which alone may make several recurrences of the same tokens."""
    torch.manual_seed(0)
    *tokens, states = heads
    inputs = [torch.randn(2, 7, h, 4, dtype=torch.float64) for h in tokens]
    inputs[1] = torch.nn.functional.normalize(inputs[1], dim=-1)
    if operation == "delta_rule":
        inputs.append(torch.rand(2, 7, 1, dtype=torch.float64))
    inputs.append(torch.randn(2, states, 4, 4, dtype=torch.float64))
    results = []
    for module, options in ((lasp, {"output_final_state": True}), (reference, {})):
        own = [x.clone().requires_grad_() for x in inputs]
        outputs = getattr(module, operation)(*own[:-1], initial_state=own[-1], **options)
        grads = torch.autograd.grad([x.square().sum() for x in outputs], own)
        results.append({str(i): x for i, x in enumerate((*outputs, *grads))})
    assert results[0]["0"].shape == results[1]["0"].shape == (2, 7, max(states, heads[0]), 4)
    assert results[0]["1"].shape == results[1]["1"].shape
    assert largest_error(*results) < 1e-12


def test_no_tokens() -> None:
    x, state = torch.randn(2, 0, 3), torch.randn(2, 3)
    for z, final in (
        logcumsumexp(x, initial_state=state, output_final_state=True),
        reference.logcumsumexp(x, initial_state=state),
    ):
        assert z.shape == (2, 0, 3)
        torch.testing.assert_close(final, state)
