"""Calls with the cut of their batch: exact, without headers; and cuts that the ranks do not agree on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist

import lasp
from lasp.functional.delta import delta_product
from lasp.functional.logcumsumexp import logcumsumexp
from tests.attention import largest_error
from tests.operations import OPERATIONS, Case, T

pytestmark = pytest.mark.mpi
GroupOf = Callable[..., lasp.SequenceGroup | None]
expected = cache(Case.specify)
TAKES_CUT = sorted(set(OPERATIONS) - {"shard"})


def raised(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("operation", TAKES_CUT)
def test_operations_are_exact_and_send_no_headers(group_of: GroupOf, operation: str, size: int) -> None:
    if (group := group_of(size)) is None:
        return
    case, cut = Case(operation, "contiguous", ranks=size), group.cut(T)
    with lasp.traffic() as ledger:
        found = case.solve(lambda group, **inputs: case.table.run(cut=cut, **inputs), group.rank, group)
    assert not ledger.of("control")
    case.sum_up(found, partial(dist.all_reduce, group=group.process_group))
    assert largest_error(found, expected(case, group.rank)) < 1e-12


def inputs(tokens: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 1, tokens, 2, 4, generator=rng, dtype=torch.float64)
    gates, beta = torch.rand(2, 1, tokens, 2, generator=rng, dtype=torch.float64)
    return [q, torch.nn.functional.normalize(k, dim=-1), v, beta, -gates]


WEIGHT = torch.linspace(-1, 1, 32, dtype=torch.float64).view(8, 4)
RUNS: dict[str, Callable[..., torch.Tensor]] = {
    "linear_attention": lambda q, k, v, beta, gates, **where: lasp.linear_attention(q, k, v, gates, **where),
    "unmasked": lambda q, k, v, beta, gates, **where: lasp.linear_attention(q, k, v, causal=False, **where),
    "delta_rule": lambda q, k, v, beta, gates, **where: lasp.delta_rule(q, k, v, beta, gates, **where),
    "delta_product": lambda q, k, v, beta, gates, **where: delta_product(
        q, torch.stack([k, v.tanh() / 2], 2), torch.stack([v, q], 2), torch.stack([beta, beta], 2), gates, **where
    ),
    "softmax_attention": lambda q, k, v, beta, gates, **where: lasp.softmax_attention(q, k, v, window=9, **where),
    "causal_conv1d": lambda q, k, v, beta, gates, **where: lasp.causal_conv1d(q.flatten(2), WEIGHT, **where),
    "logcumsumexp": lambda q, k, v, beta, gates, **where: logcumsumexp(q, **where),
}
CUTS = [
    (2, "contiguous", (0, 1, 10, 10, 31, 37)),
    (4, "zigzag", (0, 1, 10, 10, 31, 37)),
    (4, "contiguous", (0, 20, 37)),
    (4, "zigzag", None),
]


@pytest.mark.parametrize(("size", "layout", "bounds"), CUTS)
@pytest.mark.parametrize("name", RUNS)
def test_documents_and_layouts(group_of: GroupOf, name: str, size: int, layout: str, bounds) -> None:
    if (group := group_of(size, layout)) is None:
        return
    cut = group.cut(37, cu_seqlens=bounds)
    whole = [x.requires_grad_() for x in inputs(37)]
    own = [lasp.shard(x.detach(), cut=cut).requires_grad_() for x in whole]
    alone, ours = RUNS[name](*whole, cu_seqlens=bounds), RUNS[name](*own, cut=cut)
    torch.testing.assert_close(ours, lasp.shard(alone, cut=cut), rtol=0, atol=1e-12)
    grads = torch.autograd.grad(alone.square().sum(), whole, allow_unused=True)
    found = torch.autograd.grad(ours.square().sum(), own, allow_unused=True)
    for own_grad, grad in zip(found, grads, strict=True):
        assert (own_grad is None) == (grad is None)
        if grad is not None:
            torch.testing.assert_close(own_grad, lasp.shard(grad, cut=cut), rtol=0, atol=1e-10)


def test_any_contiguous_cut(group_of: GroupOf) -> None:
    group = group_of(4)
    assert group is not None
    cut = group.cut(lengths=[5, 0, 30, 2])
    whole = inputs(37)
    own = [lasp.shard(x, cut=cut) for x in whole]
    assert own[0].shape[1] == (5, 0, 30, 2)[group.rank]
    for run in RUNS.values():
        torch.testing.assert_close(run(*own, cut=cut), lasp.shard(run(*whole), cut=cut), rtol=0, atol=1e-12)
    torch.testing.assert_close(lasp.unshard(own[0], cut=cut), whole[0], rtol=0, atol=0)


MISTAKES: dict[str, tuple[str, Callable[[lasp.SequenceGroup, bool], object]]] = {
    "length": ("ranks disagree on lengths", lambda group, wrong: group.cut(37 + wrong)),
    "lengths": ("ranks disagree on lengths", lambda group, wrong: group.cut(lengths=[9, 9 + wrong, 9, 10 - wrong])),
    "documents": ("ranks disagree on cu_seqlens", lambda group, wrong: group.cut(37, cu_seqlens=[0, 5 + wrong, 37])),
    "no documents": (
        "ranks disagree on cu_seqlens",
        lambda group, wrong: group.cut(37, cu_seqlens=None if wrong else [0, 37]),
    ),
    "end": (
        "must end at the whole sequence's length 37",
        lambda group, wrong: group.cut(37, cu_seqlens=[0, 37 + wrong]),
    ),
    "neither": ("needs a length or lengths", lambda group, wrong: group.cut(None if wrong else 37)),
    "both": ("needs a length or lengths", lambda group, wrong: group.cut(37, lengths=[37] if wrong else None)),
    "too few": ("one per rank, 4 of them, got 3", lambda group, wrong: group.cut(lengths=[9, 9, 9, 10][wrong:])),
    "kind": ("length of a cut must be a whole number", lambda group, wrong: group.cut("37" if wrong else 37)),
    "negative": ("tokens of a rank must be", lambda group, wrong: group.cut(lengths=[9, 9, 9, -10 if wrong else 10])),
    "another call": (
        "ranks disagree on the call",
        lambda group, wrong: group.cut(37) if not wrong else lasp.unshard(torch.ones(1, 9), group),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_one_rank_is_refused_on_all(world, group_of: GroupOf, name: str) -> None:
    group, (words, call) = group_of(4), MISTAKES[name]
    assert group is not None
    assert words in raised(lambda: call(group, world.rank == 2))
    assert group.cut(37).total == 37  # the group goes on


@pytest.mark.parametrize("mode", ["autocast", "gradients"])
def test_modes_belong_to_the_cut(world, group_of: GroupOf, mode: str) -> None:
    group, wrong = group_of(4), world.rank == 1
    assert group is not None
    entered = torch.autocast("cpu", torch.bfloat16, enabled=wrong) if mode == "autocast" else nullcontext()
    with entered, torch.set_grad_enabled(mode == "autocast" or not wrong):
        assert f"ranks disagree on {mode}" in raised(lambda: group.cut(8))


@pytest.mark.parametrize("name", RUNS)
def test_tokens_that_do_not_fit_the_cut(group_of: GroupOf, name: str) -> None:
    group = group_of(4)
    assert group is not None
    run = partial(RUNS[name], *inputs(8))
    assert "the cut gives rank" in raised(lambda: run(cut=group.cut(37)))
    assert "not both" in raised(lambda: run(cut=group.cut(32), group=group))
    assert "not both" in raised(lambda: run(cut=group.cut(32), cu_seqlens=[0, 32]))


def test_checks_have_names(subgroups, world) -> None:
    for named, checked in (("calls", True), ("off", False), (True, True), (False, False)):
        assert lasp.SequenceGroup.from_group(subgroups[4], checks=named).checks is checked
    assert "checks must be True" in raised(lambda: lasp.SequenceGroup.from_group(subgroups[4], checks="some"))
    assert "disagree on checks" in raised(
        lambda: lasp.SequenceGroup.from_group(subgroups[4], checks="calls" if world.rank else "off")
    )


def test_unchecked_groups_agree_on_nothing(group_of: GroupOf) -> None:
    if (group := group_of(2, checks=False)) is None:
        return
    with lasp.traffic() as ledger:
        cut = group.cut(9, cu_seqlens=[0, 4, 9])
        assert cut.lengths == (5, 4)
        assert group.cut(9).lengths == (5, 4)
        assert group.cut(lengths=[1, 8]).lengths == (1, 8)
    assert not ledger.records


@pytest.mark.parametrize("numbers", [(1, 2, 3, 2), (5, 5, 5, None), (None, None, None, 7)])
def test_ranks_that_count_other_items_all_raise(world, group_of: GroupOf, numbers) -> None:
    group = group_of(4)
    assert group is not None
    cut, labels = group.cut(8), torch.tensor([[0, 1]])
    logits = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(world.rank))
    told = raised(lambda: lasp.cross_entropy(logits, labels, cut=cut, num_items=numbers[world.rank]))
    assert told == f"the ranks give other num_items, this one {numbers[world.rank]}"
    assert not lasp.cross_entropy(logits, labels, cut=cut, num_items=0).isfinite()  # they agree, and divide by it
    alike = lasp.cross_entropy(logits, labels, cut=cut, num_items=torch.tensor(8))
    torch.testing.assert_close(alike, lasp.cross_entropy(logits, labels, cut=cut))
    assert "num_items must be a finite number" in raised(
        lambda: lasp.cross_entropy(logits, labels, cut=cut, num_items="abc")
    )
