"""A recurrence by exchanging tokens for heads: each rank runs some heads over the whole sequence, and nothing passes
between states. What the others of this field do (Ulysses, arXiv:2309.14509): bytes grow with the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
from typing import Any

from torch import Tensor

from lasp.parallel.call import Turn
from lasp.parallel.heads import head_exchange, heads_to_tokens, leave_heads, tokens_to_heads
from lasp.parallel.scan import Heads, Scan, check_scan


def by_heads(turn: Turn, scan: str | Scan) -> bool:
    """Whether a call over ranks is to exchange tokens for heads."""
    return turn.group is not None and isinstance(check_scan(scan), Heads)


def run_by_heads(
    turn: Turn,
    operation: Callable[..., Any],
    tensors: Sequence[Tensor | None],
    initial_state: Tensor | None,
    output_final_state: bool,
    steps: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """`operation(*tensors, initial_state=, cu_seqlens=, output_final_state=)` of one device, over all ranks.

    tensors: [B, T, h, ...] of this rank's tokens, with `steps` rows to each, or [h] where all tokens share it. Heads
    that are fewer than the ranks are copied, as `repeat_interleave` does.
    """
    cut = turn()
    exchange = head_exchange(turn, cut, steps)

    def own(x: Tensor, dim: int) -> Tensor:
        return deal(x, cut.size, dim).chunk(cut.size, dim)[cut.rank]

    of_tokens = [i for i, x in enumerate(tensors) if x is not None and x.dim() > 1]
    dealt = [deal(x, cut.size, 2) for x in tensors if x is not None and x.dim() > 1]
    arrived = tokens_to_heads(exchange, *(x.unsqueeze(-1) if x.dim() == 3 else x for x in dealt))
    found = [None if x is None or x.dim() > 1 else own(x, 0) for x in tensors]
    for i, sent, x in zip(of_tokens, dealt, arrived, strict=True):
        found[i] = x.squeeze(-1) if sent.dim() == 3 else x
    options: dict[str, Any] = {"initial_state": None if initial_state is None else own(initial_state, 1)}
    if cut.bounds is not None:
        options["cu_seqlens"] = [steps * bound for bound in cut.bounds]
    if not output_final_state:
        return heads_to_tokens(exchange, operation(*found, **options))[0]
    output, final = leave_heads(exchange, *operation(*found, output_final_state=True, **options))
    states = max(x.shape[0 if x.dim() == 1 else 2] for x in tensors[1:] or tensors if x is not None)
    states = max(states, 1 if initial_state is None else initial_state.shape[1])
    return output, final[:, :: final.shape[1] // states]


def deal(x: Tensor, ranks: int, dim: int) -> Tensor:
    """Heads copied so often that each rank gets as many."""
    return x.repeat_interleave(ranks // gcd(ranks, x.shape[dim]), dim)


def check_deal(heads: int, ranks: int) -> None:
    """Raises ValueError where the most heads of a call cannot be dealt out to the ranks."""
    if heads % ranks:
        raise ValueError(
            f"scan 'heads' deals out heads to {ranks} ranks, which must divide their number, got {heads}; every other "
            "scan takes any number"
        )
