"""Recurrences by exchanging tokens for heads, over 2, 3 and 4 ranks, against the token-by-token reference."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

import lasp
from lasp.functional import delta_product
from tests.distributed.cutting import DOCUMENTS, UNEVEN, case, even_lengths, put_together, solve_cut
from tests.oracle import DECAYS, assert_close

pytestmark = pytest.mark.mpi

CASES = [(size, "contiguous", lengths) for size, lengths in UNEVEN]
CASES += [(size, "zigzag", even_lengths(size, "zigzag")) for size in (2, 4)]


@pytest.mark.parametrize(("size", "layout", "lengths"), CASES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS], ids=["", "packed"])
@pytest.mark.parametrize("beta", [None, 1.0], ids=["linear", "delta"])
def test_parity(group_of, size: int, layout: str, lengths: tuple[int, ...], decay: str, cu_seqlens, beta) -> None:
    """Fewer heads of keys than ranks among them: as many of queries as the ranks divide, 2 of the others."""
    if (group := group_of(size, layout)) is None or (beta is not None and decay == "head"):
        return
    problem, expected = case(decay, cu_seqlens=cu_seqlens, beta=beta, heads=(6 if size == 3 else 4, 2, 2, 2))
    assert_close(solve_cut(problem, group, lengths, "heads"), expected, problem, 1e-10)


@pytest.mark.parametrize("heads", [(4, 1, 1, 4), (1, 1, 8, 2), (8, 8, 8, 8)])
def test_grouped_heads(group_of, heads: tuple[int, int, int, int]) -> None:
    group = group_of(4)
    problem, expected = case("token", heads=heads)
    assert_close(solve_cut(problem, group, (10, 9, 9, 9), "heads"), expected, problem, 1e-10)


def test_without_mask(group_of) -> None:
    group = group_of(4)
    problem, expected = case("none", causal=False)
    assert_close(solve_cut(problem, group, (10, 9, 9, 9), "heads"), expected, problem, 1e-10)


def test_gates_of_another_dtype_travel_as_they_are(group_of) -> None:
    group = group_of(2)
    if group is None:
        return
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 12, 2, 4).bfloat16() for _ in range(3))
    gates = -torch.rand(1, 12, 2)
    expected = lasp.linear_attention(q, k, v, gates)
    own = [lasp.shard(x, group).requires_grad_() for x in (q, k, v, gates)]
    with lasp.traffic() as ledger:
        output = lasp.linear_attention(*own, group=group, scan="heads")
        output.float().sum().backward()
    found = put_together({"output": output.detach()}, (), group, (6, 6))["output"]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    # Of 6 tokens one head each: q, k and v in 2 bytes, the gate in 4; and the output.
    (there, back) = (record.bytes for record in ledger.of("forward"))
    assert (there, back) == (6 * (3 * 4 * 2 + 4), 6 * 4 * 2)
    assert all(x.grad is not None and x.grad.dtype == x.dtype for x in own)


def test_delta_product(group_of) -> None:
    group = group_of(2, "zigzag")
    if group is None:
        return
    torch.manual_seed(0)
    q, gates = torch.randn(1, 13, 2, 4).double(), -torch.rand(1, 13, 2).double()
    k, v = normalize(torch.randn(1, 13, 3, 2, 4).double(), dim=-1), torch.randn(1, 13, 3, 2, 5).double()
    beta = torch.rand(1, 13, 3, 2).double()
    expected, final = delta_product(q, k, v, beta, gates, output_final_state=True)
    own = [lasp.shard(x, group) for x in (q, k, v, beta, gates)]
    output, last = delta_product(*own, output_final_state=True, group=group, scan="heads")
    torch.testing.assert_close(lasp.unshard(output, group), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, final, rtol=0, atol=1e-12)


def test_a_rank_whose_loss_has_no_part_of_the_final_state(group_of) -> None:
    group = group_of(2)
    if group is None:
        return
    q, k, v = (torch.randn(1, 3, 2, 4, requires_grad=True) for _ in range(3))
    output, final = lasp.linear_attention(q, k, v, output_final_state=True, group=group, scan="heads")
    (output.sum() if group.rank else output.sum() + final.sum()).backward()
    assert k.grad is not None


@pytest.mark.parametrize(("size", "heads"), [(2, 3), (4, 2)])
def test_heads_that_cannot_be_dealt_out(group_of, size: int, heads: int) -> None:
    group = group_of(size)
    if group is None:
        return
    x = torch.randn(1, 3, heads, 4)
    with pytest.raises(ValueError, match=f"to {size} ranks, which must divide their number, got {heads}"):
        lasp.linear_attention(x, x, x, group=group, scan="heads")
