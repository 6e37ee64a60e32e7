"""The delta rule with the sequence cut over 1, 2 and 4 ranks, against the token-by-token reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from mpi4py import MPI

import lasp
from lasp.parallel.exchange import Flight
from lasp.parallel.layout import make_plan
from lasp.parallel.scan import SCANS
from lasp.parallel.schedule import Links, Sizes
from tests.distributed.cutting import DOCUMENTS, SCANNED, case, cut_problem, even_lengths, solve_cut
from tests.oracle import assert_close, make_problem

pytestmark = pytest.mark.mpi

DECAYS = ("none", "token", "channel")


@pytest.mark.parametrize(("scan", "size", "lengths"), SCANNED)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS], ids=["", "packed"])
def test_parity(group_of, size: int, lengths: tuple[int, ...], decay: str, scan: str, cu_seqlens) -> None:
    if (group := group_of(size)) is None:
        return
    problem, expected = case(decay, cu_seqlens=cu_seqlens, beta=2.0)
    assert_close(solve_cut(problem, group, lengths, scan), expected, problem, 1e-10)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS], ids=["", "packed"])
def test_zigzag(group_of, size: int, decay: str, scan: str, cu_seqlens) -> None:
    if (group := group_of(size, layout="zigzag")) is None:
        return
    problem, expected = case(decay, cu_seqlens=cu_seqlens, beta=2.0)
    assert_close(solve_cut(problem, group, even_lengths(size, "zigzag"), scan), expected, problem, 1e-10)


@pytest.mark.parametrize("decay", DECAYS[1:])
@pytest.mark.parametrize("strength", [0.0, 50.0])
def test_strong_decays(group_of, decay: str, strength: float) -> None:
    """The third rank's tokens are all of one document, which begins and ends elsewhere."""
    group = group_of(4)
    problem, expected = case(decay, strength=strength, cu_seqlens=(0, 5, 31, 37), beta=2.0)
    assert_close(solve_cut(problem, group, (10, 9, 9, 9), "gather"), expected, problem, 1e-10)


@pytest.mark.parametrize("heads", [(4, 2, 2, 1), (1, 1, 4, 2)])
def test_grouped_heads(group_of, heads: tuple[int, int, int, int]) -> None:
    problem, expected = case("token", heads=heads, beta=2.0)
    assert_close(solve_cut(problem, group_of(4), (10, 9, 9, 9), "gather"), expected, problem, 1e-10)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("scan", SCANS)
def test_long_chains(group_of, decay: str, scan: str) -> None:
    """512 chunks on each of two ranks."""
    if (group := group_of(2)) is None:
        return
    problem, expected = case(decay, 1024, heads=(1, 1, 1, 1), dims=(3, 2), strength=0.01, beta=2.0)
    assert_close(solve_cut(problem, group, (512, 512), scan, chunk_size=1), expected, problem, 1e-10)


# The ledger ---------------------------------------------------------------------------------------------------------

STATE = 2 * 2 * 6 * 5 * 8  # bytes: two batches, two heads, K = 6, V = 5, fp64
TRANSFER = 2 * 2 * 6 * 6 * 8


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("scan", SCANS)
def test_which_scans_send_transfers(group_of, size: int, scan: str) -> None:
    """The gather does forward, doubling and nodes of what is no state yet; a dense A never goes round a ring."""
    if (group := group_of(size)) is None:
        return
    problem = make_problem("token", 36, initial=False, beta=2.0)
    local = cut_problem(problem, group, (36 // size,) * size)
    q = local.q.requires_grad_()
    with lasp.traffic() as ledger:
        lasp.delta_rule(q, local.k, local.v, local.beta, local.log_decay, group=group, scan=scan).backward(
            local.grad_output
        )
    if scan == "gather":
        assert ledger.of("forward") == [("all_gather", "forward", (size - 1) * (STATE + TRANSFER), 1)]
        assert ledger.of("backward") == [("all_gather", "backward", (size - 1) * STATE, 1)]
        return
    for phase, rank in (("forward", group.rank), ("backward", size - 1 - group.rank)):
        received = STATE * (rank > 0)
        if scan == "doubling":  # in two steps [0, 1), and of ranks 2 and 3 a map and a state
            received = [0, STATE, 2 * STATE + TRANSFER, 2 * STATE + TRANSFER][rank]
        if scan == "two_level":  # one node: the maps of all links before, the first of which is a state
            received = rank * STATE + max(rank - 1, 0) * TRANSFER
        steps = {"doubling": size.bit_length() - 1, "two_level": 1}.get(scan, size - 1)
        if scan not in ("ring", "pipeline", "doubling", "two_level"):  # one without a formula here
            plan = make_plan((36 // size,) * size, group.rank, "contiguous", None)
            way = SCANS[scan]().schedule(Links.of(plan, size, phase == "backward"))
            received, steps = way.received(group.rank, Sizes(STATE, TRANSFER, 5)), way.steps
        assert ledger.of(phase) == [(scan, phase, received, steps)]


def saved(call: Callable[[], torch.Tensor]) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """The shapes of the tensors that autograd saves in a call, and its result; they are copied on their way back."""
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return shapes, result


@pytest.mark.parametrize(
    ("layout", "cu_seqlens", "kept"),
    [
        ("contiguous", None, (2, 1, 0, 0)),  # not the last one's: no gradient enters its end
        ("zigzag", None, (6, 4, 3, 2)),
        ("contiguous", (0, 5, 31, 37), (2, 1, 0, 0)),
        ("contiguous", (0, 20, 37), (1, 0, 0, 0)),  # a document begins on the third rank, and ends on the fourth
    ],
)
def test_autograd_saves_the_transfers_of_later_links(group_of, layout: str, cu_seqlens, kept: tuple[int, ...]) -> None:
    """What the gather saves more than the ring, which keeps none: checkpointing and offloading see it."""
    group = group_of(4, layout=layout)
    problem = make_problem("token", 37, beta=2.0, cu_seqlens=cu_seqlens, initial=False)
    local = cut_problem(problem, group, even_lengths(4, layout))
    k = local.k.requires_grad_()
    shapes, grads = {}, {}
    for scan in ("ring", "gather"):
        run = partial(lasp.delta_rule, local.q, k, local.v, local.beta, local.log_decay, group=group, scan=scan)
        shapes[scan], output = saved(partial(run, cu_seqlens=cu_seqlens))
        (grads[scan],) = torch.autograd.grad(output, k, local.grad_output)
    torch.testing.assert_close(grads["gather"], grads["ring"], rtol=0, atol=1e-12)
    count, transfer = kept[group.rank], (k.shape[0], 2, 6, 6)
    assert sorted(shapes["gather"]) == sorted(shapes["ring"] + [(count, *transfer)] * bool(count))


def test_nothing_is_kept_where_nothing_is_trained(group_of, monkeypatch: pytest.MonkeyPatch) -> None:
    group, kept, wait = group_of(4), [], Flight.wait
    monkeypatch.setattr(Flight, "wait", lambda self: (arrival := wait(self), kept.append(arrival.kept))[0])
    local = cut_problem(make_problem("token", 36, beta=2.0), group, (9, 9, 9, 9))
    run = partial(lasp.delta_rule, k=local.k, v=local.v, beta=local.beta, group=group)
    run(local.q)
    with torch.no_grad():
        run(local.q.clone().requires_grad_())
    assert kept == [None, None]
    run(local.q.clone().requires_grad_())
    assert (kept[2] is None) == (group.rank > 1)


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [(2,), (0, 1, 2, 3)], ids=["one rank", "all ranks"])
def test_every_rank_refuses_what_one_rank_gives(group_of, world: MPI.Comm, wrong: tuple[int, ...]) -> None:
    group = group_of(4)
    local = cut_problem(make_problem("token", 36, beta=2.0), group, (9, 9, 9, 9))
    k = local.k * 2 if group.rank in wrong else local.k
    with pytest.raises(ValueError, match=r"beta·\|k\|\^2 must not exceed 2") as error:
        lasp.delta_rule(local.q, k, local.v, local.beta, local.log_decay, group=group)
    assert len(set(world.allgather(str(error.value)))) == 1
    assert torch.isfinite(lasp.delta_rule(local.q, local.k, local.v, local.beta, group=group)).all()
