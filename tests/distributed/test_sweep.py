"""The sweep of tests/lasp/test_sweep.py with the sequence cut over two ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist

from tests.attention import largest_error
from tests.operations import LAYOUTS, LIMITS, OPERATIONS, Case, Compiled, in_all_modes

pytestmark = [pytest.mark.mpi, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_sweep(world, group_of, operation: str, dtype: torch.dtype) -> None:
    group = group_of(2)
    if group is None:
        return
    torch._dynamo.reset()
    compiled = Compiled(OPERATIONS[operation].run)
    errors = {}
    for layout in LAYOUTS:
        case = Case(operation, layout, dtype, ranks=2)
        expected = case.specify(group.rank)
        for mode, found in in_all_modes(case, compiled, rank=group.rank, group=group).items():
            case.sum_up(found, partial(dist.all_reduce, group=group.process_group))
            errors[layout, mode] = largest_error(found, expected)
    assert max(errors.values()) < LIMITS[dtype], errors
