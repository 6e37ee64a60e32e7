"""The sweep of tests/lasp/test_sweep.py with the sequence cut over two ranks."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.distributed as dist

from tests.attention import largest_error
from tests.operations import LAYOUTS, LIMITS, MODES, OPERATIONS, Case

pytestmark = [pytest.mark.mpi, pytest.mark.slow]
expected = cache(Case.specify)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_sweep(world, group_of, operation: str, layout: str, dtype: torch.dtype, mode: str) -> None:
    group = group_of(2)
    if group is None:
        return
    torch._dynamo.reset()
    case = Case(operation, layout, dtype, ranks=2)
    found = case.solve(MODES[mode](case.table.run), group.rank, group)
    for name in case.table.whole:  # each rank has its part of the gradient
        found[f"d{name}"] = found[f"d{name}"].double().contiguous()
        dist.all_reduce(found[f"d{name}"], group=group.process_group)
    assert largest_error(found, expected(case, group.rank)) < LIMITS[dtype]
