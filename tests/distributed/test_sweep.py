"""The sweep of tests/lasp/test_sweep.py with the sequence cut over two ranks."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
import torch.distributed as dist

from tests.attention import largest_error
from tests.operations import LAYOUTS, LIMITS, MODES, OPERATIONS, Case

pytestmark = [pytest.mark.mpi, pytest.mark.slow, pytest.mark.timeout(600)]
expected = cache(Case.specify)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_sweep(world, group_of, operation: str, dtype: torch.dtype, mode: str) -> None:
    group = group_of(2)
    if group is None:
        return
    torch._dynamo.reset()
    run = MODES[mode](OPERATIONS[operation].run)
    errors = {}
    for layout in LAYOUTS:
        case = Case(operation, layout, dtype, ranks=2)
        found = case.solve(run, group.rank, group)
        case.sum_up(found, partial(dist.all_reduce, group=group.process_group))
        errors[layout] = largest_error(found, expected(case, group.rank))
    assert max(errors.values()) < LIMITS[dtype], errors
