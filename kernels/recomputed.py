"""Recurrences that say what a chunk of tokens does, and no more: autograd knows the way back.

In plain PyTorch, one chunk after the other. Only the states between chunks are kept; a chunk is computed again in
backward, so that nothing inside it outlives it. Over ranks each direction passes the tokens twice: once for the map of
each run, from an empty memory, and once with the state that enters it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor

from lasp.kernels.chain import Chain
from lasp.kernels.chunks import ceil_div
from lasp.kernels.precision import compute_dtype
from lasp.kernels.recurrence import Recurrence
from lasp.kernels.segment import Segment, compose, transpose


@dataclass(frozen=True)
class Recomputed(Recurrence):
    """A recurrence of inputs of its own kind, a NamedTuple of tensors [B, T, ...] but for those that are `fixed`.

    A chunk is given inputs in the compute dtype, those of its tokens and the fixed ones whole.
    """

    fixed: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def chunk(self, inputs: Any, state: Tensor) -> tuple[Tensor, Tensor]:
        """The output [B, C, H, V] of one chunk and the state after it, given the state [B, H, K, V] ahead of it."""

    @abstractmethod
    def transfer(self, inputs: Any) -> Tensor:
        """What one chunk, or none, does to a state ahead of it: [B, H, K, 1] or [B, H, K, K]."""

    @abstractmethod
    def operations(self, inputs: Any) -> int: ...

    @abstractmethod
    def empty(self, inputs: Any) -> Tensor:
        """An empty memory [B, H, K, V]."""

    @abstractmethod
    def new_output(self, inputs: Any) -> Tensor:
        """Memory for the output [B, T, H, V]."""

    def transfer_rule(self, inputs: Any) -> Callable[[int], Tensor] | None:
        return None

    # Forward ----------------------------------------------------------------------------------------------------------

    def states(self, inputs: Any) -> RecomputedChain:
        return RecomputedChain(self, inputs)

    def inside(self, inputs: Any, chain: RecomputedChain) -> None:
        """Nothing: what a chunk yields, it yields with the state that enters it."""

    def read_out(self, inputs: Any, entered: RecomputedChain, inside: None) -> Tensor:
        output, true = self.forward(inputs, entered.entering)
        entered.states, entered.ends = true.states, true.ends
        return output

    def forward(self, inputs: Any, incoming: list[Tensor | None]) -> tuple[Tensor, RecomputedChain]:
        output, memory, ends = self.new_output(inputs), self.empty(inputs), []
        count = sum(ceil_div(length, self.chunk_size) for _, length in self.runs)
        states = memory.new_empty(count, *memory.shape)
        slots = iter(states)
        for run, entering in enumerate(incoming):
            state = memory if entering is None else entering
            for tokens in self.chunks(run):
                next(slots).copy_(state)
                output[:, tokens], state = self.chunk(self.part(inputs, tokens), state)
            ends.append(state)
        return output, RecomputedChain(self, inputs, states, ends)

    def restore(self, inputs: Any, tensors: tuple[Tensor, ...]) -> RecomputedChain:
        (states,) = tensors
        return RecomputedChain(self, inputs, states)

    # Backward ---------------------------------------------------------------------------------------------------------

    def adjoint(self, inputs: Any, grad: Tensor, entered: RecomputedChain) -> RecomputedAdjoint:
        return RecomputedAdjoint(self, inputs, grad, entered)

    def grad_outputs(self, inputs: Any, grad: Tensor, entered: RecomputedChain) -> Tensor:
        """The output's, for what follows."""
        return grad

    def grad_states(self, inputs: Any, entered: RecomputedChain, adjoint: RecomputedAdjoint, found: Tensor) -> Any:
        grads, adjoint.ends = self.backward(inputs, found, entered, adjoint.entering)
        return grads

    def backward(
        self, inputs: Any, grad: Tensor, entered: RecomputedChain, incoming: list[Tensor | None]
    ) -> tuple[Any, list[Tensor]]:
        fixed = [name in self.fixed for name in inputs._fields]
        totals = [
            torch.zeros_like(x, dtype=_precise(x) if whole else x.dtype) for x, whole in zip(inputs, fixed, strict=True)
        ]
        assert entered.states is not None, "kept from forward"
        slots, starts = len(entered.states), []
        for run in reversed(range(len(self.runs))):
            state = incoming[run]
            later = self.empty(inputs) if state is None else state
            for tokens in reversed(list(self.chunks(run))):
                slots -= 1
                *found, later = self.pull(inputs, tokens, entered.states[slots], grad, later)
                for total, own, whole in zip(totals, found, fixed, strict=True):
                    if whole:
                        total += own
                    else:
                        total[:, tokens] = own
            starts.append(later)
        return type(inputs)(*(t.to(x.dtype) for t, x in zip(totals, inputs, strict=True))), starts[::-1]

    def pull(
        self, inputs: Any, tokens: slice, state: Tensor, grad: Tensor, later: Tensor, all_inputs: bool = True
    ) -> list[Tensor]:
        """Gradients of one chunk's inputs, where asked for, and of the state ahead of it, given that of the state after
        it."""
        with torch.enable_grad():
            own = self.part(inputs, tokens)
            leaves = [x.requires_grad_() for x in own] if all_inputs else []
            before = state.detach().requires_grad_()
            output, after = self.chunk(own, before)
            outer = [grad[:, tokens].to(output.dtype), later]
            return list(torch.autograd.grad([output, after], [*leaves, before], outer, materialize_grads=True))

    # Chunks -----------------------------------------------------------------------------------------------------------

    def chunks(self, run: int) -> Iterator[slice]:
        """The tokens of each chunk of a run."""
        offset, length = self.runs[run]
        for start in range(offset, offset + length, self.chunk_size):
            yield slice(start, min(start + self.chunk_size, offset + length))

    def part(self, inputs: Any, tokens: slice) -> Any:
        """What a chunk of these tokens is given: new leaves of a graph, in the compute dtype of the first input."""
        named, dtype = zip(inputs._fields, inputs, strict=True), compute_dtype(inputs[0])
        parts = (x if name in self.fixed else x[:, tokens] for name, x in named)
        return type(inputs)(*(x.detach().to(dtype.to_complex() if x.is_complex() else dtype) for x in parts))

    def whole_transfer(self, inputs: Any, run: int) -> Tensor:
        """What a run does to the state that enters it."""
        stretches = [slice(0, 0), *self.chunks(run)]  # of no tokens it is the identity, whose shape all have
        parts = (self.transfer(self.part(inputs, tokens)) for tokens in stretches)
        return reduce(lambda first, later: compose(later, first), parts)


class RecomputedChain(Chain):
    """The state ahead of each chunk [chunks, B, H, K, V], once it is known; ends: those after each run."""

    reverse = False

    def __init__(
        self, recurrence: Recomputed, inputs: Any, states: Tensor | None = None, ends: list[Tensor] | None = None
    ) -> None:
        self._recurrence, self._inputs = recurrence, inputs
        self.states, self.ends = states, ends
        self.entering: list[Tensor | None] = []

    def segment(self, run: int) -> Segment:
        recurrence, inputs = self._recurrence, self._inputs
        state = recurrence.empty(inputs)
        for tokens in recurrence.chunks(run):
            _, state = recurrence.chunk(recurrence.part(inputs, tokens), state)
        return Segment(recurrence.whole_transfer(inputs, run), state)

    def enter(self, incoming: list[Tensor | None]) -> None:
        self.entering = incoming

    def fill(self, runs: list[Tensor]) -> None:
        raise NotImplementedError("these recurrences know only the past")

    def leaving(self) -> list[Tensor]:
        assert self.ends is not None, "the tokens have been passed"
        return self.ends

    def tensors(self) -> tuple[Tensor, ...]:
        assert self.states is not None, "the tokens have been passed"
        return (self.states,)


class RecomputedAdjoint(RecomputedChain):
    """The same of gradients, in reverse."""

    reverse = True

    def __init__(self, recurrence: Recomputed, inputs: Any, grad: Tensor, entered: RecomputedChain) -> None:
        super().__init__(recurrence, inputs)
        self._grad = grad

    def segment(self, run: int) -> Segment:
        recurrence, inputs = self._recurrence, self._inputs
        later = nothing = recurrence.empty(inputs)
        for tokens in reversed(list(recurrence.chunks(run))):
            # The state's gradient does not depend on the state.
            (later,) = recurrence.pull(inputs, tokens, nothing, self._grad, later, all_inputs=False)
        return Segment(transpose(recurrence.whole_transfer(inputs, run)), later)


def _precise(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_complex() else compute_dtype(x)
