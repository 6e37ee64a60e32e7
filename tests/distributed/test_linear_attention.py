"""Linear attention with the sequence cut over 1, 2 and 4 ranks, against the token-by-token reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lasp
from lasp.kernels import reference
from lasp.parallel.scan import SCANS, Gather, Pipeline, Scan, TwoLevel
from tests.distributed.cutting import DOCUMENTS, SCANNED, case, cut_problem, even_lengths, solve_cut
from tests.oracle import DECAYS, assert_close, errors, make_problem, solve

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize(("scan", "size", "lengths"), SCANNED)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS], ids=["", "packed"])
def test_parity(group_of, size: int, lengths: tuple[int, ...], decay: str, scan: str, cu_seqlens) -> None:
    if (group := group_of(size)) is None:
        return
    problem, expected = case(decay, cu_seqlens=cu_seqlens)
    assert_close(solve_cut(problem, group, lengths, scan), expected, problem, 1e-10)


@pytest.mark.parametrize("scan", [Gather(chunk_ranks=1), Gather(chunk_ranks=3), TwoLevel(2), Pipeline(3)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_options_of_scans(group_of, scan: Scan, layout: str) -> None:
    group, lengths = group_of(4, layout=layout), even_lengths(4, layout)
    problem, expected = case("channel", cu_seqlens=DOCUMENTS)
    assert_close(solve_cut(problem, group, lengths, scan), expected, problem, 1e-10)


def test_bf16_on_the_wire(group_of) -> None:
    """Of states alone: transfers travel as they are, and a ledger tells that states take a quarter of fp64."""
    group = group_of(4)
    problem, expected = case("channel", 36, initial=False)
    with lasp.traffic() as ledger:
        found = solve_cut(problem, group, (9,) * 4, Gather(wire=torch.bfloat16))
    assert 1e-4 < max(errors(found, expected, problem).values()) < 1e-2
    sent = [
        record.bytes for phase in ("forward", "backward") for record in ledger.of(phase) if record.op == "all_gather"
    ]
    assert sent == [3 * (STATE // 4 + TRANSFER["channel"]), 3 * STATE // 4]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS], ids=["", "packed"])
def test_two_runs_per_rank(group_of, size: int, decay: str, scan: str, cu_seqlens) -> None:
    """The zigzag layout: two links of the chain on every rank."""
    if (group := group_of(size, layout="zigzag")) is None:
        return
    lengths = even_lengths(size, "zigzag")
    problem, expected = case(decay, cu_seqlens=cu_seqlens)
    assert_close(solve_cut(problem, group, lengths, scan), expected, problem, 1e-10)


@pytest.mark.parametrize(("scan", "size", "lengths"), SCANNED)
@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS], ids=["", "packed"])
@pytest.mark.parametrize("initial", [True, False])
def test_without_mask(group_of, size: int, lengths: tuple[int, ...], scan: str, cu_seqlens, initial: bool) -> None:
    if (group := group_of(size)) is None:
        return
    problem, expected = case("none", cu_seqlens=cu_seqlens, causal=False, initial=initial)
    assert_close(solve_cut(problem, group, lengths, scan), expected, problem, 1e-10)


@pytest.mark.parametrize("decay", DECAYS[1:])
@pytest.mark.parametrize("strength", [20.0, 50.0])
@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS], ids=["", "packed"])
def test_strong_decays(group_of, decay: str, strength: float, cu_seqlens) -> None:
    group = group_of(4)
    problem, expected = case(decay, strength=strength, cu_seqlens=cu_seqlens)
    assert_close(solve_cut(problem, group, (10, 9, 9, 9), "gather"), expected, problem, 1e-10)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("scan", SCANS)
def test_fp32(group_of, decay: str, scan: str) -> None:
    group = group_of(4)
    problem, expected = case(decay, 150, strength=0.2, dims=(32, 16), dtype=torch.float32)
    assert_close(solve_cut(problem, group, (40, 37, 13, 60), scan), expected, problem, 1e-5, gates=1e-4)


@pytest.mark.parametrize("heads", [(4, 2, 2, 2), (1, 1, 4, 4), (2, 2, 2, 1)])
def test_grouped_heads(group_of, heads: tuple[int, int, int, int]) -> None:
    group = group_of(4)
    problem, expected = case("token", heads=heads)
    assert_close(solve_cut(problem, group, (10, 9, 9, 9), "gather"), expected, problem, 1e-10)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_unchecked_group_gives_the_same(group_of, layout: str) -> None:
    """37 tokens do not divide: what cu_seqlens do not tell, the ranks tell one another."""
    group = group_of(4, layout=layout, checks=False)
    lengths = even_lengths(4, layout)
    for cu_seqlens in (None, DOCUMENTS):
        problem, expected = case("head", cu_seqlens=cu_seqlens)
        with lasp.traffic() as ledger:
            found = solve_cut(problem, group, lengths, "gather")
        assert_close(found, expected, problem, 1e-10)
        assert len(ledger.of("control")) == (cu_seqlens is None)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("decay", DECAYS)
def test_grouped_heads_without_states(group_of, decay: str, scan: str) -> None:
    """No initial and no final state: the path of a model in training."""
    group, lengths = group_of(4), (10, 9, 9, 9)
    problem, _ = case(decay, heads=(4, 2, 1, 2), initial=False)
    local = cut_problem(problem, group, lengths)

    def attention(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        options.pop("initial_state")
        output = lasp.linear_attention(*args, chunk_size=8, group=group, scan=scan, **options)
        return output, output.new_zeros(local.grad_final.shape, requires_grad=True)

    no_final = replace(problem, grad_final=torch.zeros_like(problem.grad_final))
    found, expected = solve(replace(local, grad_final=no_final.grad_final), attention), solve(no_final)
    part = slice(sum(lengths[: group.rank]), sum(lengths[: group.rank + 1]))
    for name in ("output", "dq", "dk", "dv"):
        torch.testing.assert_close(found[name], expected[name][:, part], rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", DECAYS)
def test_bf16_is_within_twice_the_error_of_bf16_pytorch(group_of, decay: str) -> None:
    group = group_of(4)
    problem, exact = case(decay, 100, strength=0.1, dims=(32, 16), dtype=torch.bfloat16)

    def all_in_bf16(*args: torch.Tensor, initial_state: torch.Tensor, **options: object) -> tuple:
        return reference.linear_attention(*args, initial_state=initial_state.bfloat16(), **options)

    ours = errors(solve_cut(problem, group, (25, 30, 20, 25), "gather"), exact, problem)
    peer = errors(solve(problem, all_in_bf16), exact, problem)
    worse = {name: (ours[name], peer[name]) for name in ours if ours[name] > 2 * peer[name]}
    assert not worse


@pytest.mark.parametrize("decay", DECAYS)
def test_checkpointing_and_a_second_backward(group_of, decay: str) -> None:
    """Recomputation exchanges again, and a kept graph can be walked twice."""
    group, lengths = group_of(4), (10, 9, 9, 9)
    problem, _ = case(decay, initial=False)
    local = cut_problem(problem, group, lengths)
    part = slice(sum(lengths[: group.rank]), sum(lengths[: group.rank + 1]))
    no_final = solve(replace(problem, grad_final=torch.zeros_like(problem.grad_final)))
    q = local.q.clone().requires_grad_()

    def attention(q: torch.Tensor) -> torch.Tensor:
        return lasp.linear_attention(q, local.k, local.v, local.log_decay, group=group, chunk_size=8)

    output = checkpoint(attention, q, use_reentrant=False)
    (once,) = torch.autograd.grad(output, q, local.grad_output)
    output = attention(q)
    for _ in range(2):
        (again,) = torch.autograd.grad(output, q, local.grad_output, retain_graph=True)
        assert torch.equal(once, again)
    torch.testing.assert_close(once, no_final["dq"][:, part], rtol=0, atol=1e-12)


# The ledger ---------------------------------------------------------------------------------------------------------

STATE = 2 * 2 * 6 * 5 * 8  # bytes: two batches, two heads, K = 6, V = 5, fp64
TRANSFER = {"none": 0, "head": 0, "token": 2 * 2 * 8, "channel": 2 * 2 * 6 * 8}


def run_once(group: lasp.SequenceGroup, decay: str, scan: str, causal: bool = True) -> lasp.parallel.collectives.Ledger:
    problem = make_problem(decay, 36, initial=False, causal=causal)
    lengths = tuple(36 // group.size for _ in range(group.size))
    local = cut_problem(problem, group, lengths)
    q = local.q.requires_grad_()
    with lasp.traffic() as ledger:
        output = lasp.linear_attention(q, local.k, local.v, local.log_decay, causal=causal, group=group, scan=scan)
        output.backward(local.grad_output)
    return ledger


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("decay", DECAYS)
def test_gather_is_one_all_gather_each_way(group_of, size: int, decay: str) -> None:
    if (group := group_of(size)) is None:
        return
    ledger = run_once(group, decay, "gather")
    assert ledger.of("forward") == [("all_gather", "forward", (size - 1) * (STATE + TRANSFER[decay]), 1)]
    assert ledger.of("backward") == [("all_gather", "backward", (size - 1) * STATE, 1)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("decay", DECAYS)
def test_ring_takes_one_hop_less_than_ranks(group_of, size: int, decay: str) -> None:
    if (group := group_of(size)) is None:
        return
    ledger = run_once(group, decay, "ring")
    first, last = group.rank == 0, group.rank == size - 1
    assert ledger.of("forward") == [("ring", "forward", 0 if first else STATE, size - 1)]
    assert ledger.of("backward") == [("ring", "backward", 0 if last else STATE, size - 1)]


@pytest.mark.parametrize("size", [2, 4])
def test_zigzag_ring_takes_twice_the_hops(group_of, size: int) -> None:
    if (group := group_of(size, layout="zigzag")) is None:
        return
    problem = make_problem("token", 40, initial=False)
    local = cut_problem(problem, group, tuple(40 // size for _ in range(size)))
    with lasp.traffic() as ledger:
        lasp.linear_attention(local.q, local.k, local.v, local.log_decay, group=group, scan="ring")
    # The middle two links are neighbours on the last rank, and nothing enters the very first.
    received = {0: 1, size - 1: 1}.get(group.rank, 2)
    assert ledger.of("forward") == [("ring", "forward", received * STATE, 2 * (size - 1))]


def test_without_mask_is_one_all_reduce_each_way(group_of) -> None:
    ledger = run_once(group_of(4), "none", "gather", causal=False)
    assert ledger.of("forward") == [("all_reduce", "forward", 2 * 3 * STATE // 4, 1)]
    assert ledger.of("backward") == [("all_reduce", "backward", 2 * 3 * STATE // 4, 1)]


def test_one_rank_sends_nothing(group_of) -> None:
    if (group := group_of(1)) is not None:
        assert run_once(group, "channel", "gather").records == []


def test_the_exchange_is_in_flight_while_the_inside_computes(group_of, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order of events on one rank: the scan starts, the inside computes, the scan is awaited; the same backwards."""
    from lasp.kernels.portable.recurrence import PortableRecurrence
    from lasp.parallel import collectives, exchange

    events: list[str] = []
    for name in ("inside", "grad_outputs"):
        kernel = getattr(PortableRecurrence, name)
        monkeypatch.setattr(
            PortableRecurrence, name, lambda *args, _k=kernel, _n=name: (events.append(_n), _k(*args))[1]
        )
    start, wait = collectives.gather, exchange.Flight.wait
    monkeypatch.setattr(collectives, "gather", lambda *args: (events.append("start"), start(*args))[1])
    monkeypatch.setattr(exchange.Flight, "wait", lambda self: (events.append("wait"), wait(self))[1])
    run_once(group_of(4), "token", "gather")
    assert events == ["start", "inside", "wait", "start", "grad_outputs", "wait"]
