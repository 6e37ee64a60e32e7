"""Every public operation in every layout and dtype, as it is and compiled: what the specification says in fp64."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.attention import largest_error
from tests.operations import LAYOUTS, LIMITS, MODES, OPERATIONS, Case

expected = cache(Case.specify)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_sweep(operation: str, dtype: torch.dtype, mode: str) -> None:
    torch._dynamo.reset()
    run = MODES[mode](OPERATIONS[operation].run)
    for layout in LAYOUTS:
        case = Case(operation, layout, dtype)
        assert largest_error(case.solve(run), expected(case)) < LIMITS[dtype], layout
