"""Every public operation in any layout of memory and under autocast: the results that it has otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lasp import functional
from tests.attention import largest_error
from tests.operations import LAYOUTS, LIMITS, OPERATIONS, Case, is_continuous

AS_THE_HEAD = {"linear_cross_entropy", "token_log_probs"}  # what autocast makes of a linear layer, it makes of them

GATES = {"log_decay", "rates"}
GATED = [name for name, table in OPERATIONS.items() if GATES & table.shapes.keys()]
DIFFERENTIABLE = [name for name, table in OPERATIONS.items() if table.differentiable]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_layouts(operation: str, layout: str) -> None:
    """Inputs and incoming gradients that are permuted, expanded, sliced or in the middle of a larger tensor."""
    case = Case(operation, layout)
    assert largest_error(case.solve(), case.specify()) < LIMITS[torch.float64]


@pytest.mark.parametrize("operation", DIFFERENTIABLE)
def test_second_derivatives_are_right_or_refused(operation: str) -> None:
    """Also behind a gradient that is a constant, as that of `.sum()`."""
    case = Case(operation, "contiguous")

    def second(run: Callable[..., Any], rank: int | None) -> dict[str, Tensor]:
        inputs = {name: x.requires_grad_() if is_continuous(x) else x for name, x in case.inputs(rank).items()}
        outputs = run(**inputs)
        total = sum(x.real.sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,)))
        trained = [x for x in inputs.values() if x.requires_grad]
        grads = torch.autograd.grad(total, trained, create_graph=True)
        penalty = total + sum(x.abs().square().sum() for x in grads)
        return {str(i): x for i, x in enumerate(torch.autograd.grad(penalty, trained))}

    if operation in ("cross_entropy", "shard", "unshard"):
        assert largest_error(second(case.table.run, 0), second(case.table.specification, None)) < LIMITS[torch.float64]
        return
    with pytest.raises(RuntimeError, match="differentiable once"):
        second(case.table.run, 0)


@dataclass(frozen=True)
class Closed(Case):
    """Gates of some tokens in a row, or of a state, that let nothing through."""

    size: float = 0.0

    def inputs(self, rank: int | None) -> dict[str, Tensor]:
        found = super().inputs(rank)
        for name in GATES & found.keys():
            found[name][(0,) if name in self.table.whole else (slice(None), slice(5, 9))] = -self.size
        return found


@pytest.mark.parametrize("size", [1e5, 1e300, float("inf")])
@pytest.mark.parametrize("operation", GATED)
def test_what_is_forgotten_at_once(operation: str, size: float) -> None:
    if (operation, size) == ("selective_scan", float("inf")):
        return  # a rate of which a step of 0 makes nothing: refused
    case = Closed(operation, "contiguous", size=size)
    assert largest_error(case.solve(), case.specify()) < LIMITS[torch.float64]


@pytest.mark.parametrize("operation", sorted(AS_THE_HEAD))
def test_autocast_multiplies_as_in_the_head_that_it_stands_for(operation: str) -> None:
    case = Case(operation, "contiguous", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.solve()
    rounded = {name: x.bfloat16().double() if x.is_floating_point() else x for name, x in case.inputs(None).items()}
    expected = case.table.specification(**rounded)
    torch.testing.assert_close(found["output 0"].double(), expected, rtol=0.01, atol=0.05)
    assert found["output 0"].dtype == torch.float32, "but sums are in fp32"


def test_they_are_all_here() -> None:
    assert {*functional.__all__} <= {name.split()[0] for name in OPERATIONS}


@pytest.mark.parametrize("operation", DIFFERENTIABLE)
def test_a_gradient_of_one_number(operation: str) -> None:
    """What `.sum()` gives: a gradient of stride 0 in every dim."""
    case = Case(operation, "contiguous")
    found = []
    for run, rank in ((case.table.run, 0), (case.table.specification, None)):
        inputs = {name: x.requires_grad_() if is_continuous(x) else x for name, x in case.inputs(rank).items()}
        outputs = run(**inputs) if rank is None else run(**inputs, group=None)
        sum(x.real.sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
        found.append({name: x.grad for name, x in inputs.items() if x.grad is not None})
    assert largest_error(*found) < LIMITS[torch.float64]


@pytest.mark.parametrize("operation", sorted(OPERATIONS.keys() - AS_THE_HEAD))
def test_autocast_changes_nothing(operation: str) -> None:
    """An operation computes in the dtypes of its inputs, in both directions."""
    case = Case(operation, "contiguous", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.solve()
    for name, x in case.solve().items():
        assert torch.equal(found[name], x), name
