"""hybrid_attention with the sequence cut over real ranks; tests/lasp/test_hybrid_attention.py has the hard cuts."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import lasp
from lasp.kernels import reference
from lasp.parallel.cut import even_lengths
from lasp.parallel.layout import pieces_of
from tests.attention import largest_error
from tests.distributed.cutting import put_together
from tests.hybrid import LENGTH, VARIANTS, make, solve

pytestmark = pytest.mark.mpi


@cache
def expected_of(variant: str) -> dict[str, Tensor]:
    inputs, options = make(**VARIANTS[variant])
    return solve(reference.hybrid_attention, inputs, **options)


@pytest.mark.parametrize("variant", ["window above a shard", "everything"])
@pytest.mark.parametrize(("size", "layout"), [(1, "contiguous"), (2, "zigzag"), (4, "contiguous"), (4, "zigzag")])
def test_parity(group_of, size: int, layout: Any, variant: str) -> None:
    if (group := group_of(size, layout)) is None:
        return
    lengths = even_lengths(LENGTH, size, layout)
    inputs, options = make(**VARIANTS[variant])
    own = [piece for piece in pieces_of(lengths, layout) if piece.rank == group.rank]
    local = {n: x if x.dim() == 1 else torch.cat([x[:, p.start : p.stop] for p in own], 1) for n, x in inputs.items()}
    found = solve(lasp.hybrid_attention, local, **options, group=group)
    found = put_together(found, {"dwindow_factor"}, group, lengths)
    assert largest_error(found, expected_of(variant)) < 1e-10


def test_a_window_crosses_once_and_states_once(group_of) -> None:
    """What a rank receives of a window of 3 tokens is theirs alone, however many tokens it has."""
    group = group_of(4)
    inputs, options = make(window=3)
    local = {name: x[:, 9 * group.rank : 9 * group.rank + 9] for name, x in inputs.items()}
    with lasp.traffic() as ledger:
        solve(lasp.hybrid_attention, local, **options, group=group, scan="gather")
    features, state = 2 * 5 + 2 * 6 + 4 * 3 + 1, 4 * 3 * 6
    halo, scan = ledger.of("forward")
    assert (halo.op, halo.bytes) == ("all_to_all", (group.rank > 0) * 2 * 3 * features * 8)
    assert scan.bytes == 3 * 2 * state * 8
