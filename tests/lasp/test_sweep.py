"""Every public operation in every layout and dtype, as it is and compiled: what the specification says in fp64."""

from __future__ import annotations

import pytest
import torch

from tests.attention import largest_error
from tests.operations import LAYOUTS, LIMITS, OPERATIONS, Case, Compiled, in_all_modes


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_sweep(operation: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    compiled = Compiled(OPERATIONS[operation].run)
    for layout in LAYOUTS:
        case = Case(operation, layout, dtype)
        expected = case.specify()
        for mode, found in in_all_modes(case, compiled).items():
            assert largest_error(found, expected) < LIMITS[dtype], (layout, mode)
