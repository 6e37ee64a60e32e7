"""flash-linear-attention's operators with a scan between them, on stand-ins, against the token-by-token reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.distributed.cutting import case, even_lengths, solve_cut
from tests.fla_operators import in_place_of_fla
from tests.oracle import assert_close

pytestmark = pytest.mark.mpi

PACKED = (0, 1, 10, 10, 21, 37)


@pytest.fixture(autouse=True)
def fla() -> Iterator[None]:
    with in_place_of_fla():
        yield


@pytest.mark.parametrize(
    ("decay", "lengths", "scan", "options"),
    [
        ("none", (5, 32), "gather", {}),
        ("head", (37, 0), "ring", {"cu_seqlens": PACKED}),
        ("token", None, "ring", {"cu_seqlens": PACKED}),
        ("channel", (1, 20, 0, 16), "gather", {"strength": 50.0}),
        ("channel", (1, 20, 0, 16), "ring", {"initial": False}),
        ("none", None, "gather", {"beta": 2.0, "initial": False}),
        ("token", (1, 20, 0, 16), "gather", {"beta": 2.0}),
        ("channel", (5, 32), "ring", {"beta": 2.0, "cu_seqlens": PACKED}),
    ],
    ids=str,
)
def test_parity(group_of, decay: str, lengths: tuple[int, ...] | None, scan: str, options: dict[str, Any]) -> None:
    """lengths: of the ranks' contiguous parts, None for two ranks on zigzag."""
    layout = "zigzag" if lengths is None else "contiguous"
    lengths = lengths or even_lengths(2, layout)
    if (group := group_of(len(lengths), layout)) is None:
        return
    problem, expected = case(decay, dtype=torch.float32, **options)
    seen = solve_cut(problem, group, lengths, scan, chunk_size=64, backend="fla")
    assert_close(seen, expected, problem, 1e-5, gates=1e-4)


def test_short_inputs(group_of) -> None:
    """The transfers of a delta rule are of fp32 operands."""
    if (group := group_of(4)) is not None:
        problem, expected = case("token", dtype=torch.bfloat16, beta=1.0)
        seen = solve_cut(problem, group, (10, 9, 9, 9), "gather", chunk_size=64, backend="fla")
        assert_close(seen, expected, problem, 2e-2)
