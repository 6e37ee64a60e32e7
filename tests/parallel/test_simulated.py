"""Recurrences cut over as many ranks as one process can pretend to be, against one device: outputs and gradients."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import lasp
from lasp.launch.threads import run
from lasp.parallel.cut import even_lengths
from lasp.parallel.layout import even_slices, pieces_of
from lasp.parallel.scan import SCANS, Gather, Scan, TwoLevel
from tests.distributed.cutting import cut_problem
from tests.oracle import DECAYS, Problem, assert_close, errors, make_problem, solve
from tests.parallel.test_scan import ALL

LENGTHS = (1, 20, 0, 16, 3, 0, 11, 9)
# Documents of one token, none, that begin with a rank's tokens, and that cross several ranks.
DOCUMENTS = (0, 1, 21, 21, 22, 37, 50, 60, 60)
FAMILIES: dict[str, dict[str, Any]] = {
    **{decay: {"decay": decay} for decay in DECAYS},
    "delta": {"decay": "token", "beta": 2.0},
    "no mask": {"decay": "none", "causal": False},
}


@lru_cache
def case(family: str, length: int, cu_seqlens: tuple[int, ...] | None, **options: Any) -> tuple[Problem, dict]:
    problem = make_problem(length=length, cu_seqlens=cu_seqlens, **FAMILIES[family], **options)
    return problem, solve(problem)


def solve_cut(problem: Problem, lengths: tuple[int, ...], layout: str, scan: Any, node_size: int | None = 2) -> Any:
    """The results of all ranks, put together."""

    def rank(group: lasp.SequenceGroup) -> dict[str, Tensor]:
        bounds = None if problem.cu_seqlens is None else tuple(problem.cu_seqlens)
        operation = lasp.linear_attention if problem.beta is None else lasp.delta_rule
        call = partial(operation, output_final_state=True, chunk_size=4, scan=scan)
        cut = lasp.Cut(group, lengths, bounds)

        def given(*args: Tensor, cu_seqlens: Any, **options: Any) -> Any:
            return call(*args, cut=cut, **options)

        return solve(cut_problem(problem, group, lengths), given)

    parts = run(len(lengths), rank, layout, node_size)
    whole: dict[str, Tensor] = {"final_state": parts[0].pop("final_state")}
    for name in parts[0]:
        found = [part[name] for part in parts]
        if name == "dinitial_state" or found[0].dim() == 1:
            whole[name] = torch.stack(found).sum(0)
            continue
        shape = list(found[0].shape)
        whole[name] = found[0].new_zeros(shape[0], sum(lengths), *shape[2:])
        for piece in pieces_of(lengths, layout):
            tokens = slice(piece.offset, piece.offset + piece.stop - piece.start)
            whole[name][:, piece.start : piece.stop] = found[piece.rank][:, tokens]
    return whole


@pytest.mark.parametrize("scan", ALL, ids=str)
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("none", "token"))) for name in FAMILIES]
)
def test_eight_ranks(scan: Scan, family: str) -> None:
    """Uneven and empty parts, documents, initial and final states."""
    problem, expected = case(family, 60, DOCUMENTS)
    assert_close(solve_cut(problem, LENGTHS, "contiguous", scan), expected, problem, 1e-10)


@pytest.mark.parametrize("scan", ALL, ids=str)
@pytest.mark.parametrize("family", ["channel", "delta"])
def test_eight_ranks_with_two_links_each(scan: Scan, family: str) -> None:
    problem, expected = case(family, 60, None)
    assert_close(solve_cut(problem, even_lengths(60, 8, "zigzag"), "zigzag", scan), expected, problem, 1e-10)


@pytest.mark.parametrize(
    ("scan", "ranks", "layout"),
    [
        *((kind(), 64, "contiguous") for kind in SCANS.values()),
        *(pytest.param(scan, 64, "contiguous", marks=pytest.mark.slow) for scan in (*ALL, TwoLevel(8))),
        *(pytest.param(scan, 16, "zigzag", marks=pytest.mark.slow) for scan in (*ALL, TwoLevel(8))),
    ],
    ids=str,
)
def test_many_ranks(scan: Scan, ranks: int, layout: str) -> None:
    problem, expected = case("delta", 130, None, heads=(1, 1, 1, 1), dims=(3, 2))
    assert_close(solve_cut(problem, even_lengths(130, ranks, layout), layout, scan), expected, problem, 1e-10)


@pytest.mark.parametrize("ranks", [4, 64])
def test_bf16_on_the_wire_is_as_far_off_on_any_number_of_ranks(ranks: int) -> None:
    """A state is rounded once, however far it goes: 2e-3 of it, where the other scans would round it on every hop."""
    problem, expected = case("none", 130, None, heads=(1, 1, 1, 1), dims=(8, 8), dtype=torch.float32)
    lengths = even_lengths(130, ranks, "contiguous")
    rounded = errors(solve_cut(problem, lengths, "contiguous", Gather(wire=torch.bfloat16)), expected, problem)
    assert 1e-4 < max(rounded.values()) < 3e-3


@pytest.mark.parametrize("scan", SCANS)
def test_inference_mode_holds_where_a_thread_passes_states_on(scan: str) -> None:
    problem, expected = case("delta", 60, None)

    def rank(group: lasp.SequenceGroup) -> Tensor:
        own = cut_problem(problem, group, LENGTHS)
        given = {"initial_state": own.initial_state, "cut": lasp.Cut(group, LENGTHS), "scan": scan}
        with torch.inference_mode():
            return lasp.delta_rule(own.q, own.k, own.v, own.beta, own.log_decay, **given)

    output = torch.cat(run(8, rank, "contiguous", 2), 1)
    torch.testing.assert_close(output, expected["output"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_losses_ask_not_how_rows_lie(layout: Any) -> None:
    """Rows laid flat, [B·T] of which are no even cut; a rank may hold none of them."""
    logits, labels = torch.randn(3, 13, 7, dtype=torch.float64), torch.randint(7, (3, 13))

    def rank(group: lasp.SequenceGroup) -> Tensor:
        part, targets = lasp.shard(logits, group), lasp.shard(labels, group)
        none = slice(0) if group.rank == 1 else slice(None)
        log_probs = lasp.token_log_probs(part.flatten(0, 1), None, targets.flatten(), group=group).sum()
        whole = lasp.cross_entropy(part.flatten(0, 1), targets.flatten(), group=group)
        return torch.stack([whole, log_probs, lasp.cross_entropy(part[:, none], targets[:, none], group=group)])

    found = torch.stack(run(2, rank, layout, checks=True))
    whole = lasp.cross_entropy(logits, labels)
    own = torch.cat([torch.arange(13)[part] for part in even_slices(13, 0, 2, layout)])
    alone = lasp.cross_entropy(logits[:, own], labels[:, own])
    torch.testing.assert_close(found[:, 0], whole.expand(2))
    torch.testing.assert_close(found[:, 1].sum(), -whole * labels.numel())
    torch.testing.assert_close(found[:, 2], alone.expand(2))
