"""The running log-sum-exp with the sequence cut over 1, 2 and 4 ranks, against the token-by-token reference."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import lasp
from lasp.functional import logcumsumexp
from lasp.parallel.layout import pieces_of
from lasp.parallel.scan import SCANS
from tests.convolution import largest_error
from tests.distributed.cutting import CUTS, DOCUMENTS, even_lengths, put_together
from tests.running_sums import SumProblem, make_sums, solve_sums

pytestmark = pytest.mark.mpi

CASES = [(size, "contiguous", lengths) for size, cuts in CUTS.items() for lengths in cuts]
CASES += [(size, "zigzag", even_lengths(size, "zigzag")) for size in CUTS]


@lru_cache
def case(**options: Any) -> tuple[SumProblem, dict[str, Tensor]]:
    problem = make_sums(**options)
    return problem, solve_sums(problem)


@pytest.mark.parametrize(("size", "layout", "lengths"), CASES)
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(("exclusive", "initial"), [(False, True), (True, False)])
@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS], ids=["", "packed"])
def test_parity(
    group_of, size: int, layout: str, lengths: tuple[int, ...], scan: str, exclusive: bool, initial: bool, cu_seqlens
) -> None:
    if (group := group_of(size, layout=layout)) is None:
        return
    problem, expected = case(exclusive=exclusive, initial=initial, cu_seqlens=cu_seqlens)
    pieces = [p for p in pieces_of(lengths, layout) if p.rank == group.rank]
    x, grad = (torch.cat([t[:, p.start : p.stop] for p in pieces], 1) for t in (problem.x, problem.grad_output))
    # A replicated output receives the sum over the ranks of their gradients.
    local = problem._replace(x=x, grad_output=grad, grad_final=problem.grad_final / size)
    found = solve_sums(local, partial(logcumsumexp, output_final_state=True, group=group, scan=scan))
    final = found.pop("final_state")
    whole = put_together(found, {"dinitial_state"}, group, lengths)
    assert largest_error(whole | {"final_state": final}, expected) < 1e-10


@pytest.mark.parametrize(("layout", "links"), [("contiguous", 1), ("zigzag", 2)])
def test_one_row_per_link_crosses_each_way(group_of, layout: str, links: int) -> None:
    group = group_of(4, layout=layout)
    x = torch.randn(2, 10, 5, dtype=torch.float64, requires_grad=True)
    with lasp.traffic() as ledger:
        logcumsumexp(x, group=group).sum().backward()
    for phase in ("forward", "backward"):
        assert ledger.of(phase) == [("all_gather", phase, 3 * links * 2 * 5 * 8, 1)]


def test_the_ring_takes_one_hop_less_than_ranks(group_of) -> None:
    group = group_of(4)
    x = torch.randn(2, 10, 5, dtype=torch.float64, requires_grad=True)
    with lasp.traffic() as ledger:
        logcumsumexp(x, group=group, scan="ring").sum().backward()
    row = 2 * 5 * 8
    assert ledger.of("forward") == [("ring", "forward", row * (group.rank > 0), 3)]
    assert ledger.of("backward") == [("ring", "backward", row * (group.rank < 3), 3)]


def test_a_mistake_of_one_rank_is_told_by_all(world, group_of) -> None:
    group = group_of(4)
    with pytest.raises(ValueError, match="ranks disagree on exclusive"):
        logcumsumexp(torch.zeros(1, 3, 2), exclusive=world.rank == 2, group=group)
    with pytest.raises(ValueError, match="x must be floating"):
        logcumsumexp(torch.zeros(1 if world.rank == 2 else (1, 3, 2)), group=group)
