"""Several memories to a run: a recurrence over rows that were gathered for each memory (MoM, arXiv:2502.13685).

To ranks and documents it looks like one recurrence over the text, whose state holds those of all memories side by side.
What a kernel sees are the rows alone, those that each memory is sent of each run and sequence of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.kernels.chain import Chain
from lasp.kernels.inputs import Gradients, Inputs
from lasp.kernels.recurrence import Recurrence
from lasp.kernels.segment import Segment


class Rows(NamedTuple):
    """Where the rows that memories are sent come from, in the order of runs, sequences, memories and time.

    source: [R], of each row its place among all (sequence, token, choice); place: [B, T, n], the inverse. runs:
    (offset, length) of each stretch that one memory reads, some of them empty.
    """

    source: Tensor
    place: Tensor
    runs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, memories: Tensor, count: int, runs: Sequence[tuple[int, int]]) -> Rows:
        """memories [B, T, n]: which of so many each token is sent to. runs: (offset, length) of the text's, in order.

        The lengths come back to Python: an accelerator is waited for. Without values every memory has as many.
        """
        batch, device = memories.shape[0], memories.device
        lengths = torch.tensor([length for _, length in runs], device=device)
        run = torch.arange(len(runs), device=device).repeat_interleave(lengths, output_size=memories.shape[1])
        stretch = (run[:, None] * batch + torch.arange(batch, device=device)[:, None, None]) * count + memories
        source = stretch.flatten().argsort(stable=True)  # a memory reads in the order of time
        found = counts_of(stretch.flatten(), len(runs) * batch * count)
        place = torch.empty_like(source)
        place[source] = torch.arange(len(source), device=device)
        starts = accumulate(found, initial=0)
        return cls(source, place.view_as(memories), tuple(zip(starts, found, strict=False)))


def counts_of(index: Tensor, count: int) -> list[int]:
    """How often each number below `count` is in index [N]; of fake tensors and on meta, which have no values, all as
    often."""
    if index.untyped_storage().device.type == "meta":
        ends = [len(index) * number // count for number in range(count + 1)]
        return [end - start for start, end in pairwise(ends)]
    found: list[int] = torch.bincount(index, minlength=count).tolist()
    return found


@dataclass(frozen=True)
class Gathered(Recurrence):
    """`inner` over rows [1, R, ...] that were gathered; states are [B, memories·H, K, V] for each run of the text.

    texts: how many runs that has. The fields of every recurrence are those of `inner`.
    """

    inner: Recurrence
    batch: int
    texts: int

    @classmethod
    def around(cls, inner: Recurrence, batch: int, texts: int) -> Gathered:
        return cls(inner.runs, inner.heads, inner.scale, inner.causal, inner.chunk_size, inner, batch, texts)

    def states(self, inputs: Inputs) -> GatheredChain:
        return self._of_text(self.inner.states(inputs))

    def inside(self, inputs: Inputs, chain: GatheredChain) -> Any:
        return self.inner.inside(inputs, chain.rows)

    def read_out(self, inputs: Inputs, entered: GatheredChain, inside: Any) -> Tensor:
        return self.inner.read_out(inputs, entered.rows, inside)

    def forward(self, inputs: Inputs, incoming: list[Tensor | None]) -> tuple[Tensor, GatheredChain]:
        output, chain = self.inner.forward(inputs, self.apart(incoming))
        return output, self._of_text(chain)

    def restore(self, inputs: Inputs, tensors: tuple[Tensor, ...]) -> GatheredChain:
        return self._of_text(self.inner.restore(inputs, tensors))

    def adjoint(self, inputs: Inputs, grad: Tensor, entered: GatheredChain) -> GatheredChain:
        return self._of_text(self.inner.adjoint(inputs, grad, entered.rows))

    def grad_outputs(self, inputs: Inputs, grad: Tensor, entered: GatheredChain) -> Any:
        return self.inner.grad_outputs(inputs, grad, entered.rows)

    def grad_states(self, inputs: Inputs, entered: GatheredChain, adjoint: GatheredChain, found: Any) -> Gradients:
        return self.inner.grad_states(inputs, entered.rows, adjoint.rows, found)

    def backward(
        self, inputs: Inputs, grad: Tensor, entered: GatheredChain, incoming: list[Tensor | None]
    ) -> tuple[Gradients, list[Tensor]]:
        grads, starts = self.inner.backward(inputs, grad, entered.rows, self.apart(incoming))
        return grads, [self.together(starts[own]) for own in map(self.stretches, range(self.texts))]

    def stretches(self, run: int) -> slice:
        """Those of the rows that a run of the text has: one for each sequence and memory."""
        each = len(self.runs) // self.texts
        return slice(run * each, (run + 1) * each)

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """[1, H, ...] of all stretches of a run as [B, memories·H, ...]."""
        return torch.cat(list(parts)).unflatten(0, (self.batch, -1)).flatten(1, 2)

    def apart(self, states: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The inverse, of all runs; None stands for an empty memory."""
        found: list[Tensor | None] = []
        for state in states:
            each = len(self.runs) // self.texts
            found += [None] * each if state is None else state.unflatten(1, (-1, self.heads)).flatten(0, 1).split(1)
        return found

    def _of_text(self, rows: Chain) -> GatheredChain:
        return GatheredChain(self, rows)


class GatheredChain(Chain):
    """The chain of the rows' stretches, as one of the text's runs."""

    def __init__(self, whole: Gathered, rows: Chain) -> None:
        self._whole, self.rows, self.reverse = whole, rows, rows.reverse

    def segment(self, run: int) -> Segment:
        own = self._whole.stretches(run)
        maps = [self.rows.segment(stretch) for stretch in range(own.start, own.stop)]
        return Segment(
            *(self._whole.together(parts) for parts in ([m.transfer for m in maps], [m.state for m in maps]))
        )

    def enter(self, incoming: list[Tensor | None]) -> None:
        self.rows.enter(self._whole.apart(incoming))

    def fill(self, runs: list[Tensor]) -> None:
        raise NotImplementedError("memories of their own tokens are causal")

    def leaving(self) -> list[Tensor]:
        states = self.rows.leaving()
        return [self._whole.together(states[self._whole.stretches(run)]) for run in range(self._whole.texts)]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.rows.tensors()
