"""Linearised models with the sequence cut over ranks: loss, logits and every gradient are those of one device."""

from __future__ import annotations

import copy

import pytest

import lasp

pytest.importorskip("transformers")

from tests.distributed.test_wrap_models import assert_equal, on_one_device, on_ranks, tokens
from tests.hf_models import make
from tests.lasp.test_linearize import METHODS, shaken

pytestmark = pytest.mark.mpi
# The window is longer than a rank of four has tokens.
DOCUMENTS = [0, 2, 19, 37]
CASES = [
    pytest.param(1, "contiguous", None, marks=pytest.mark.slow),
    (2, "zigzag", None),
    (4, "contiguous", DOCUMENTS),
    pytest.param(4, "zigzag", DOCUMENTS, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("size", "layout", "bounds"), CASES)
@pytest.mark.parametrize("method", METHODS)
def test_parity(group_of, method: str, size: int, layout: str, bounds: list[int] | None) -> None:
    if (group := group_of(size, layout)) is None:
        return
    plain = shaken(lasp.linearize(make("qwen3"), method, window=11))
    ids = tokens(1 if bounds else 2, 37)
    expected = on_one_device(copy.deepcopy(plain), {"input_ids": ids}, ids, bounds)
    found = on_ranks(lasp.parallelize(plain, group), {"input_ids": ids}, ids, group, bounds)
    assert_equal(found, expected)
