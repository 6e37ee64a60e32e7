"""Shared by the tests: an operation with its sequence cut over simulated ranks, its results put together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import lasp
from lasp.launch.threads import run
from lasp.parallel.cut import even_lengths
from lasp.parallel.layout import pieces_of

Operation = Callable[..., tuple[Tensor, Any]]
# Ranks with the tokens of each, of 37: alone, unevenly and with none, and two pieces each.
CUTS = {"1": ((37,), "contiguous"), "2": ((5, 32), "contiguous"), "4": ((1, 20, 0, 16), "contiguous"),
        "4 zigzag": (even_lengths(37, 4, "zigzag"), "zigzag")}  # fmt: skip
DOCUMENTS = (0, 1, 10, 10, 21, 22, 36, 37, 37)


def results(
    operation: Operation, tokens: Mapping[str, Tensor], fixed: Mapping[str, Tensor], grad: Tensor, **options: Any
) -> dict[str, Tensor]:
    """Output, final states and gradients of an operation. tokens: [B, T, ...] each; fixed: of no token.

    Every final state gets a gradient of its own cosine, by as much as the ranks are fewer.
    """
    given = {name: x.detach().clone() for name, x in {**tokens, **fixed}.items()}
    trained = {name: x.requires_grad_() for name, x in given.items() if x.is_floating_point() or x.is_complex()}
    output, final = operation(**given, **options)
    finals = list(final) if isinstance(final, tuple) else [final]
    ranks = options["cut"].size if "cut" in options else 1
    outer = [grad, *(x.detach().cos() / ranks for x in finals)]
    found = torch.autograd.grad([output, *finals], list(trained.values()), outer, materialize_grads=True)
    named = {f"d{name}": x for name, x in zip(trained, found, strict=True)}
    return {"output": output.detach(), **{f"final {i}": x.detach() for i, x in enumerate(finals)}, **named}


def cut_results(
    operation: Operation,
    tokens: Mapping[str, Tensor],
    fixed: Mapping[str, Tensor],
    grad: Tensor,
    cut: tuple[tuple[int, ...], str],
    bounds: tuple[int, ...] | None = None,
) -> dict[str, Tensor]:
    """The same over ranks, `cut` of which says how many tokens each holds, and in which layout."""
    lengths, layout = cut

    def rank(group: lasp.SequenceGroup) -> dict[str, Tensor]:
        pieces = [p for p in pieces_of(lengths, layout) if p.rank == group.rank]

        def part(x: Tensor) -> Tensor:
            return torch.cat([x[:, p.start : p.stop] for p in pieces], 1)

        own = {name: part(x) for name, x in tokens.items()}
        return results(operation, own, fixed, part(grad), cut=lasp.Cut(group, lengths, bounds))

    parts = run(len(lengths), rank, layout)  # type: ignore[arg-type]
    whole = {name: x for name, x in parts[0].items() if name.startswith("final")}
    for name in parts[0].keys() - whole.keys():
        found = [part[name] for part in parts]
        if name[1:] in fixed:
            whole[name] = torch.stack(found).sum(0)
            continue
        whole[name] = found[0].new_zeros(found[0].shape[0], sum(lengths), *found[0].shape[2:])
        for p in pieces_of(lengths, layout):
            whole[name][:, p.start : p.stop] = found[p.rank][:, p.offset : p.offset + p.stop - p.start]
    return whole


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 1e-10) -> None:
    """Every result within a tolerance of the largest value that is wanted."""
    assert found.keys() == wanted.keys()
    errors = {
        n: ((found[n] - w).abs().max() / w.abs().max().clamp(min=1e-3)).item() for n, w in wanted.items() if w.numel()
    }
    assert max(errors.values()) <= tolerance, {n: e for n, e in errors.items() if not e <= tolerance}
