"""Every public operation in any layout of memory and under autocast: the results that it has otherwise."""

from __future__ import annotations

import pytest
import torch

from tests.attention import largest_error
from tests.operations import LAYOUTS, LIMITS, OPERATIONS, Case


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_layouts(operation: str, layout: str) -> None:
    """Inputs and incoming gradients that are permuted, expanded, sliced or in the middle of a larger tensor."""
    case = Case(operation, layout)
    assert largest_error(case.solve(), case.specify()) < LIMITS[torch.float64]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_gradient_of_one_number(operation: str) -> None:
    """What `.sum()` gives: a gradient of stride 0 in every dim."""
    case = Case(operation, "contiguous")
    found = []
    for run, rank in ((case.table.run, 0), (case.table.specification, None)):
        inputs = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in case.inputs(rank).items()}
        outputs = run(**inputs) if rank is None else run(**inputs, group=None)
        sum(x.sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
        found.append({name: x.grad for name, x in inputs.items() if x.grad is not None})
    assert largest_error(*found) < LIMITS[torch.float64]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_autocast_changes_nothing(operation: str) -> None:
    """An operation computes in the dtypes of its inputs, in both directions."""
    case = Case(operation, "contiguous", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.solve()
    for name, x in case.solve().items():
        assert torch.equal(found[name], x), name
