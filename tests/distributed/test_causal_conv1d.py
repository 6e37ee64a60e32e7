"""The causal convolution with the sequence cut over 1, 2 and 4 ranks, against the token-by-token reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import pytest
import torch

import lasp
from lasp.parallel.agreement import Call
from lasp.parallel.call import Turn
from lasp.parallel.cut import Cut
from lasp.parallel.halo import Halo, bring_halo
from lasp.parallel.layout import even_pieces, pieces_of
from tests.convolution import ConvProblem, largest_error, make_convolution, solve_convolution
from tests.distributed.cutting import put_together

pytestmark = pytest.mark.mpi

# Even, uneven, shorter than the kernel (halos over three ranks), and empty ranks in the middle and at the ends.
CUTS = {1: [(37,)], 2: [(19, 18), (1, 36), (37, 0)], 4: [(10, 9, 9, 9), (1, 1, 1, 34), (33, 0, 2, 2), (0, 20, 17, 0)]}
CASES = [(size, "contiguous", lengths) for size, cuts in CUTS.items() for lengths in cuts]
CASES += [(size, "zigzag", None) for size in CUTS]
# Documents of one token, none, ending at a border of 10 | 9 | 9 | 9, and across several ranks.
DOCUMENTS = (0, 1, 10, 10, 21, 22, 36, 37, 37)


@lru_cache
def case(**options: Any) -> tuple[ConvProblem, dict[str, torch.Tensor]]:
    """A problem and what the reference makes of it."""
    problem = make_convolution(**options)
    return problem, solve_convolution(problem)


def even_lengths(length: int, group: lasp.SequenceGroup) -> tuple[int, ...]:
    pieces = even_pieces(length, group.size, group.layout)
    return tuple(sum(p.stop - p.start for p in pieces if p.rank == rank) for rank in range(group.size))


def part(x: torch.Tensor, group: lasp.SequenceGroup, lengths: Sequence[int]) -> torch.Tensor:
    """This rank's tokens of x [B, T, ...]."""
    pieces = [p for p in pieces_of(tuple(lengths), group.layout) if p.rank == group.rank]
    return torch.cat([x[:, p.start : p.stop] for p in pieces], 1)


def solve_cut(problem: ConvProblem, group: lasp.SequenceGroup, lengths: Sequence[int]) -> dict[str, torch.Tensor]:
    """The cut problem's results, put together again."""
    local = replace(
        problem,
        inputs=problem.inputs | {"x": part(problem.inputs["x"], group, lengths)},
        grad_output=part(problem.grad_output, group, lengths),
        # A replicated output receives the sum over the ranks of their gradients.
        grad_final=problem.grad_final / group.size,
    )
    found = solve_convolution(local, partial(lasp.causal_conv1d, output_final_state=True, group=group))
    final = found.pop("final_state")
    return {"final_state": final} | put_together(found, found.keys() - {"output", "dx"}, group, tuple(lengths))


@pytest.mark.parametrize(("size", "layout", "lengths"), CASES)
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS], ids=["", "packed"])
def test_parity(group_of, size: int, layout: str, lengths: tuple[int, ...] | None, width: int, cu_seqlens) -> None:
    if (group := group_of(size, layout=layout)) is None:
        return
    problem, expected = case(width=width, cu_seqlens=cu_seqlens)
    assert largest_error(solve_cut(problem, group, lengths or even_lengths(37, group)), expected) < 1e-10


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("length", [4, 5, 9])
def test_pieces_of_one_token_and_none(group_of, layout: str, length: int) -> None:
    """On the zigzag layout 4 tokens are 4 pieces of one token and 4 of none: a halo gathers tokens of three ranks."""
    group = group_of(4, layout=layout)
    problem, expected = case(length=length, activation=None)
    assert largest_error(solve_cut(problem, group, even_lengths(length, group)), expected) < 1e-10


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_lower_precision(group_of, dtype: torch.dtype, limit: float, layout: str) -> None:
    group = group_of(4, layout=layout, checks=False)
    problem, expected = case(dtype=dtype)
    found = solve_cut(problem, group, even_lengths(37, group))
    assert {x.dtype for x in found.values()} == {dtype}
    assert largest_error(found, expected) < limit


def test_a_replicated_final_state_gathers_the_gradients_of_those_who_used_it(world, group_of) -> None:
    """Only rank 1's loss reads the final state, and nothing else: all ranks take part in both ways back."""
    group, lengths = group_of(4), (10, 9, 9, 9)
    problem, _ = case(initial=False, activation=None)
    x = part(problem.inputs["x"], group, lengths).requires_grad_()
    output, final = lasp.causal_conv1d(x, problem.inputs["weight"], output_final_state=True, group=group)
    loss = (final * problem.grad_final).sum() if world.rank == 1 else 0.0 * output.sum()
    loss.backward()
    expected = torch.zeros_like(x)
    if world.rank == 3:
        expected[:, -3:] = problem.grad_final.mT
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-12)


# The ledger ---------------------------------------------------------------------------------------------------------

TOKEN = 2 * 3 * 8  # bytes: two batches, three channels, fp64


@pytest.mark.parametrize("length", [40, 80])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_one_exchange_each_way_of_as_many_tokens_as_the_kernel_reaches_back(group_of, length: int, layout: str) -> None:
    group = group_of(4, layout=layout)
    problem, _ = case(length=length, initial=False)
    x = part(problem.inputs["x"], group, (length // 4,) * 4).requires_grad_()
    with lasp.traffic() as ledger:
        lasp.causal_conv1d(x, problem.inputs["weight"], group=group).sum().backward()
    # The first piece has nothing ahead; zigzag's rank 3 holds the middle two, which are neighbours.
    halos = {"contiguous": [(0, 1), (1, 1), (1, 1), (1, 0)], "zigzag": [(1, 1), (2, 2), (2, 2), (1, 1)]}
    received, returned = halos[layout][group.rank]
    assert ledger.of("forward") == [("all_to_all", "forward", 3 * received * TOKEN, 1)]
    assert ledger.of("backward") == [("all_to_all", "backward", 3 * returned * TOKEN, 1)]


def test_two_tensors_share_an_exchange(world, group_of) -> None:
    group, lengths = group_of(4), (3, 1, 0, 4)
    start, tokens = sum(lengths[: world.rank]), lengths[world.rank]
    x = torch.arange(start, start + tokens, dtype=torch.float64).view(1, -1).requires_grad_()
    y = x.detach().view(1, -1, 1, 1).expand(-1, -1, 2, 3).clone().requires_grad_()
    halo = Halo.of(Turn(group, Call("test", 1), lambda: Cut(group, lengths)), 2)
    with lasp.traffic() as ledger:
        own, ((before_x,), (before_y,)) = bring_halo(halo, (x, y), (torch.full((1, 1, 2), -1.0), None))
        sum(tensor.sum() for tensor in (*own, before_x, before_y)).backward()
    ahead = {0: [-1, -1], 1: [1, 2], 2: [-1, -1], 3: [2, 3]}[world.rank]
    assert before_x.flatten().tolist() == ahead
    assert before_y[0, :, 1, 2].tolist() == [max(value, 0) for value in ahead]
    # Token 1 stands ahead of rank 1, token 2 of ranks 1 and 3, token 3 of rank 3; and every token counts by itself.
    assert x.grad.flatten().tolist() == {0: [1, 2, 3], 1: [2], 2: [], 3: [1] * 4}[world.rank]
    assert y.grad[0, :, 0, 0].tolist() == x.grad.flatten().tolist()
    assert [record.op for record in ledger.records if record.phase != "control"] == ["all_to_all", "all_to_all"]


# Mistakes -----------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {  # changes, message if all make them, if rank 2 alone does
    "activation": ({"activation": "swish"}, "activation must be one of None, silu, got 'swish'", "(rank 2 of 4)"),
    "weight": ({"weight": torch.zeros(2, 4)}, "weight must be [D, W] with D = 3", "(rank 2 of 4)"),
    "state": ({"initial_state": torch.zeros(1, 3, 4)}, "initial_state must be [B, D, W - 1] = [1, 3, 3]", "(rank 2"),
    "bounds": ({"cu_seqlens": [0, 23]}, "must end at the whole sequence's length 24, got 23", "disagree on cu_seqlens"),
    "wider": ({"weight": torch.zeros(3, 5)}, "", "ranks disagree on weight: rank 0: [3, 4]"),
    "no bias": ({"bias": None}, "", "ranks disagree on bias"),
    "final state": ({"output_final_state": True}, "", "ranks disagree on final_state"),
    "dtype": ({"x": torch.zeros(1, 6, 3)}, "", "ranks disagree on dtype: rank 0: torch.float64"),
    "gradients": ({"x": torch.zeros(1, 6, 3, dtype=torch.float64).requires_grad_()}, "", "ranks disagree on backward"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_mistake_of_all_or_of_one_rank(world, group_of, name: str, layout: str) -> None:
    group, (change, of_all, of_one) = group_of(4, layout=layout), MISTAKES[name]
    good = {"x": torch.randn(1, 6, 3, dtype=torch.float64), "weight": torch.randn(3, 4), "bias": torch.randn(3)}
    spoiled = good | change
    if of_all:
        with pytest.raises(ValueError) as caught:
            lasp.causal_conv1d(**spoiled, group=group)
        assert of_all in str(caught.value)
    with pytest.raises(ValueError) as caught:
        lasp.causal_conv1d(**(spoiled if world.rank == 2 else good), group=group)
    assert len(set(world.allgather(str(caught.value)))) == 1
    assert of_one in str(caught.value)
    assert lasp.causal_conv1d(**good, group=group).isfinite().all()  # the group still works
