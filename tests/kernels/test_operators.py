"""Operators written once: what stands before the yield is the fake, and NamedTuples are laid flat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lasp.kernels.operators import operator

filled: list[torch.Size] = []


class Scaling(NamedTuple):
    factor: float
    shift: Tensor | None


@operator
def scaled_for_a_test(x: Tensor, scaling: Scaling, more: int) -> Iterator[tuple[Tensor, Tensor]]:
    """x times the factor, and more rows of the shift."""
    y, z = torch.empty_like(x), x.new_empty(more)
    yield y, z
    filled.append(x.shape)
    torch.mul(x, scaling.factor, out=y)
    z.fill_(0 if scaling.shift is None else scaling.shift.item())


def test_it_returns_what_it_yields_once_that_is_filled() -> None:
    y, z = scaled_for_a_test(torch.ones(2), Scaling(3.0, torch.tensor(5.0)), 3)
    assert (y.tolist(), z.tolist()) == ([3.0, 3.0], [5.0] * 3)
    assert scaled_for_a_test(torch.ones(2), Scaling(3.0, None), 1)[1].tolist() == [0.0]


def test_the_dispatcher_knows_the_fields() -> None:
    made = torch.ops.lasp.scaled_for_a_test.default
    expected = "(Tensor x, float scaling_factor, Tensor? scaling_shift, SymInt more) -> (Tensor, Tensor)"
    assert str(made._schema).endswith(expected)
    torch.library.opcheck(made, (torch.ones(2), 3.0, None, 1))


def test_the_fake_goes_no_further_than_the_yield() -> None:
    filled.clear()
    with FakeTensorMode():
        y, z = scaled_for_a_test(torch.ones(4), Scaling(3.0, None), 7)
    assert (y.shape, z.shape, filled) == ((4,), (7,), [])
