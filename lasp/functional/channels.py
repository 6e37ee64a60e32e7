"""Recurrences over channels: to what carries them out, heads of one value, which they neither take nor return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lasp.functional.heads import deal, run_by_heads
from lasp.functional.recurrence import whole_results
from lasp.parallel.call import Turn

Found = Tensor | tuple[Tensor, Tensor]


def channel_results(output: Tensor, final: Tensor | None, packed: bool) -> Found:
    """`whole_results` of output [B, T, I, 1] and final states [documents, B, I, K, 1], without the last dim."""
    return _of_each(whole_results(output, final, packed), lambda x: x.squeeze(-1))


def run_by_channels(
    turn: Turn, operation: Callable[..., Any], tensors: Sequence[Tensor], state: Tensor | None, output_final_state: bool
) -> Found:
    """`run_by_heads` of an operation that returns an output [B, T, I] and takes and returns states [N, I, K, 1] without
    the last dim."""

    def on_heads(*own: Tensor, initial_state: Tensor | None, **options: Any) -> Found:
        before = None if initial_state is None else initial_state.squeeze(-1)
        return _of_each(operation(*own, initial_state=before, **options), lambda x: x.unsqueeze(-1))

    return _of_each(run_by_heads(turn, on_heads, tensors, state, output_final_state), lambda x: x.squeeze(-1))


def own_channels(turn: Turn, x: Tensor) -> Tensor:
    """Those of x [I, ...] that `run_by_channels` gives this rank."""
    cut = turn()
    return deal(x, cut.size, 0).chunk(cut.size)[cut.rank]


def _of_each(found: Found, change: Callable[[Tensor], Tensor]) -> Found:
    """Another form of an output, and of the final states where there are any."""
    return (change(found[0]), change(found[1])) if isinstance(found, tuple) else change(found)
