"""The Triton kernels' stages with a scan between them, in the interpreter, against the token-by-token reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import tests.interpreter  # noqa: F401 - mends Triton's interpreter
from tests.distributed.cutting import case, even_lengths, solve_cut
from tests.oracle import assert_close

pytestmark = pytest.mark.mpi

SMALL = {"heads": (1, 1, 1, 1), "dtype": torch.float32}
PACKED = (0, 1, 10, 10, 21, 37)


@pytest.mark.parametrize(
    ("decay", "lengths", "scan", "options"),
    [
        pytest.param("none", (5, 32), "gather", {"beta": 2.0}, marks=pytest.mark.slow),
        ("head", (37, 0), "gather", {"cu_seqlens": PACKED}),
        pytest.param("token", None, "ring", {"heads": (2, 1, 2, 2), "cu_seqlens": PACKED}, marks=pytest.mark.slow),
        pytest.param("channel", (5, 32), "gather", {"strength": 50.0}, marks=pytest.mark.slow),
        pytest.param("token", None, "gather", {"beta": 2.0}, marks=pytest.mark.slow),
        ("channel", (5, 32), "ring", {"beta": 2.0, "cu_seqlens": PACKED}),
        ("none", (5, 32), "gather", {"causal": False, "cu_seqlens": PACKED}),
    ],
    ids=str,
)
def test_two_ranks(group_of, decay: str, lengths: tuple[int, int] | None, scan: str, options: dict[str, Any]) -> None:
    """lengths: of the ranks' contiguous parts, None for zigzag."""
    layout = "zigzag" if lengths is None else "contiguous"
    if (group := group_of(2, layout)) is None:
        return
    problem, expected = case(decay, **SMALL | options)
    lengths = lengths or even_lengths(2, layout)
    seen = solve_cut(problem, group, lengths, scan, chunk_size=16, backend="triton")
    assert_close(seen, expected, problem, 1e-4)
