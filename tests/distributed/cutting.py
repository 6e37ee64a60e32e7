"""Problems cut over ranks, solved there, and put together again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist

import lasp
from lasp.parallel.layout import even_pieces, pieces_of
from lasp.parallel.scan import SCANS, Scan
from tests.oracle import Problem, make_problem, solve

LENGTH = 37
CUTS = {1: [(37,)], 2: [(19, 18), (5, 32), (37, 0)], 4: [(10, 9, 9, 9), (1, 20, 0, 16)]}
CASES = [(size, lengths) for size, cuts in CUTS.items() for lengths in cuts]
UNEVEN = [(2, (5, 32)), (3, (20, 0, 17)), (4, (1, 20, 0, 16))]
# Real ranks prove of a scan that its messages meet; tests/parallel/test_scan.py that it is right, on many more.
SCANNED = [(scan, *case) for scan in SCANS for case in (CASES if scan in ("gather", "ring") else UNEVEN)]
# Documents of one token, none, ending at a border of 10 | 9 | 9 | 9 and of 1 | 20 | 0 | 16, and across several ranks.
DOCUMENTS = (0, 1, 10, 10, 21, 22, 36, 37, 37)


def even_lengths(size: int, layout: str) -> tuple[int, ...]:
    """How many of LENGTH tokens each rank holds in the even cut."""
    pieces = even_pieces(LENGTH, size, layout)
    return tuple(sum(p.stop - p.start for p in pieces if p.rank == rank) for rank in range(size))


@lru_cache
def case(decay: str, length: int = LENGTH, **options: Any) -> tuple[Problem, dict[str, torch.Tensor]]:
    """A problem and what the reference makes of it; the reference is slow, and the same for every cut and scan."""
    problem = make_problem(decay, length, **options)
    return problem, solve(problem)


def cut_problem(problem: Problem, group: lasp.SequenceGroup, lengths: tuple[int, ...]) -> Problem:
    """This rank's part of a problem; what speaks of the whole sequence stays whole."""
    pieces = [p for p in pieces_of(lengths, group.layout) if p.rank == group.rank]

    def part(x: torch.Tensor | None) -> torch.Tensor | None:
        if x is None or x.dim() == 1:
            return x
        return torch.cat([x[:, p.start : p.stop] for p in pieces], 1)

    tokens = {name: part(getattr(problem, name)) for name in ("q", "k", "v", "log_decay", "beta", "grad_output")}
    # A replicated output receives the sum over the ranks of their gradients.
    return replace(problem, **tokens, grad_final=problem.grad_final / group.size)


def put_together(
    parts: dict[str, torch.Tensor], summed: Collection[str], group: lasp.SequenceGroup, lengths: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """Whole tensors [B, N, ...] of the ranks' parts [B, T, ...], and the sums of those named: one exchange, in fp64."""
    pieces = [p for p in pieces_of(lengths, group.layout) if p.rank == group.rank]
    wholes = {}
    for name, part in parts.items():
        wholes[name] = part.double()
        if name not in summed:
            wholes[name] = wholes[name].new_zeros(part.shape[0], sum(lengths), *part.shape[2:])
            for piece, tokens in zip(pieces, part.split([p.stop - p.start for p in pieces], 1), strict=True):
                wholes[name][:, piece.start : piece.stop] = tokens
    flat = torch.cat([whole.flatten() for whole in wholes.values()])
    dist.all_reduce(flat, group=group.process_group)
    filled = flat.split([whole.numel() for whole in wholes.values()])
    return {name: x.view_as(wholes[name]).to(parts[name].dtype) for name, x in zip(parts, filled, strict=True)}


def solve_cut(
    problem: Problem,
    group: lasp.SequenceGroup,
    lengths: tuple[int, ...],
    scan: str | Scan,
    chunk_size: int = 8,
    backend: str = "auto",
) -> dict[str, torch.Tensor]:
    """The cut problem's results, put together again."""
    attention = lasp.linear_attention if problem.beta is None else lasp.delta_rule
    options = {"chunk_size": chunk_size, "scan": scan, "backend": backend}
    run = partial(attention, output_final_state=True, group=group, **options)
    local = solve(cut_problem(problem, group, lengths), run)
    final = local.pop("final_state")
    summed = {name for name, value in local.items() if name == "dinitial_state" or value.dim() == 1}
    return {"final_state": final} | put_together(local, summed, group, lengths)
