"""The short convolution of tokens that were sent to memories: in each memory over its own tokens, one after another.

Its state is what the next tokens of a memory will see of the last ones, and a stretch of tokens moves it by as many
places: an affine map, so that a scan over ranks tells how each stretch begins, wherever those tokens lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lasp.kernels.chain import Chain
from lasp.kernels.conv import causal_convolution
from lasp.kernels.precision import compute_dtype
from lasp.kernels.recurrence import Recurrence
from lasp.kernels.segment import Segment, transpose


class Sent(NamedTuple):
    """x [1, R, C], rows as `Rows` has them; weight [memories, C, W]."""

    x: Tensor
    weight: Tensor


@dataclass(frozen=True)
class SentConvolution(Recurrence):
    """`y_t = sum_i weight_m[:, i]·x_{t-W+1+i}` over the rows of each memory m; states [B, memories, W - 1, C].

    runs: of the rows, a stretch for each run of the text, sequence of the batch and memory. heads: the memories.
    """

    kind: ClassVar[Any] = Sent

    batch: int

    def states(self, inputs: Any) -> SentChain:
        return SentChain(self, inputs)

    def inside(self, inputs: Any, chain: Any) -> None:
        """Nothing: a convolution is computed once, with what entered."""

    def read_out(self, inputs: Any, entered: Any, inside: None) -> Tensor:
        output, entered.ends = self.convolve(inputs, entered.entering)
        return output.to(inputs.x.dtype)

    def forward(self, inputs: Any, incoming: list[Tensor | None]) -> tuple[Tensor, SentChain]:
        chain = self.states(inputs)
        chain.enter(incoming)
        return self.read_out(inputs, chain, None), chain

    def restore(self, inputs: Any, tensors: tuple[Tensor, ...]) -> SentChain:
        chain = self.states(inputs)
        chain.enter(list(tensors[0].unbind()))
        return chain

    def adjoint(self, inputs: Any, grad: Tensor, entered: Any) -> SentAdjoint:
        _, starts = self.backward(inputs, grad, entered, [None] * self.texts)
        return SentAdjoint(self, inputs, starts)

    def grad_outputs(self, inputs: Any, grad: Tensor, entered: Any) -> Tensor:
        """The output's, for what follows."""
        return grad

    def grad_states(self, inputs: Any, entered: Any, adjoint: Any, found: Tensor) -> Any:
        grads, adjoint.ends = self.backward(inputs, found, entered, adjoint.entering)
        return grads

    def backward(
        self, inputs: Any, grad: Tensor, entered: Any, incoming: list[Tensor | None]
    ) -> tuple[Any, list[Tensor]]:
        nothing = self.empty(inputs)
        own = Sent(*(x.detach().to(nothing.dtype).requires_grad_() for x in inputs))
        before = [(nothing if x is None else x).detach().clone().requires_grad_() for x in entered.entering]
        with torch.enable_grad():
            output, ends = self.convolve(own, before)
            outer = [grad.to(output.dtype), *(nothing if x is None else x for x in incoming)]
            dx, dweight, *starts = torch.autograd.grad([output, *ends], [*own, *before], outer, materialize_grads=True)
        return Sent(dx.to(inputs.x.dtype), dweight.to(inputs.weight.dtype)), starts

    def transfer_rule(self, inputs: Any) -> Callable[[int], Tensor] | None:
        return None

    def operations(self, inputs: Any) -> int:
        return 0  # of filters, which are counted as a model's weights

    # Stretches --------------------------------------------------------------------------------------------------------

    @property
    def texts(self) -> int:
        """How many runs the text has."""
        return len(self.runs) // (self.batch * self.heads)

    def empty(self, inputs: Sent) -> Tensor:
        """A state of memories that were sent nothing."""
        _, channels, width = inputs.weight.shape
        return inputs.x.new_zeros(self.batch, self.heads, width - 1, channels, dtype=compute_dtype(inputs.x))

    def convolve(self, inputs: Sent, entering: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        """The output [1, R, C], and the state after each run of the text. Differentiable by autograd."""
        nothing = self.empty(inputs)
        x, weight = (t.to(nothing.dtype) for t in inputs)
        before = torch.stack([nothing if state is None else state for state in entering]).flatten(0, 2).split(1)
        rows, outputs, ends = x.split([length for _, length in self.runs], 1), [nothing] * len(self.runs), []
        for memory in range(self.heads):
            own = range(memory, len(self.runs), self.heads)
            lengths = [self.runs[stretch][1] for stretch in own]
            found, leaving = causal_convolution(
                torch.cat([rows[stretch] for stretch in own], 1),
                [before[stretch] for stretch in own],
                lengths,
                weight[memory],
                None,
            )
            for stretch, output in zip(own, found.split(lengths, 1), strict=True):
                outputs[stretch] = output
            ends.append(torch.cat(leaving))
        states = torch.stack(ends, 1).unflatten(0, (self.texts, self.batch))
        return torch.cat(outputs, 1), list(states.unbind())

    def last(self, inputs: Sent, run: int) -> Tensor:
        """The last tokens of each memory in a run of the text, behind zeros where there are fewer: a state."""
        places = inputs.weight.shape[2] - 1
        parts = []
        for offset, length in self._stretches(run):
            kept = min(length, places)
            rows = inputs.x[:, offset + length - kept : offset + length].to(compute_dtype(inputs.x))
            parts.append(pad(rows, (0, 0, places - kept, 0)))
        return torch.cat(parts).unflatten(0, (self.batch, self.heads))

    def transfer(self, inputs: Sent, run: int) -> Tensor:
        """What a run of the text does to the state that enters it, [B, memories, W - 1, W - 1]: as many places up as
        it has tokens."""
        places, parts = inputs.weight.shape[2] - 1, []
        for _, length in self._stretches(run):
            moved = min(length, places)
            parts.append(inputs.x.new_ones(places - moved, dtype=compute_dtype(inputs.x)).diag(moved))
        return torch.stack(parts).unflatten(0, (self.batch, self.heads))

    def _stretches(self, run: int) -> tuple[tuple[int, int], ...]:
        each = self.batch * self.heads
        return self.runs[run * each : (run + 1) * each]


class SentChain(Chain):
    """What enters each run of the text, and what leaves it (ends), once that is known."""

    reverse = False

    def __init__(self, convolution: SentConvolution, inputs: Sent, ends: list[Tensor] | None = None) -> None:
        self._convolution, self._inputs, self.ends = convolution, inputs, ends
        self.entering: list[Tensor | None] = []

    def segment(self, run: int) -> Segment:
        return Segment(self._convolution.transfer(self._inputs, run), self._convolution.last(self._inputs, run))

    def enter(self, incoming: list[Tensor | None]) -> None:
        self.entering = incoming

    def fill(self, runs: list[Tensor]) -> None:
        raise NotImplementedError("a convolution knows only the past")

    def leaving(self) -> list[Tensor]:
        assert self.ends is not None, "the tokens have been passed"
        return self.ends

    def tensors(self) -> tuple[Tensor, ...]:
        nothing = self._convolution.empty(self._inputs)
        return (torch.stack([nothing if state is None else state for state in self.entering]),)


class SentAdjoint(SentChain):
    """The same of gradients, in reverse; ends, at first, with nothing after any run."""

    reverse = True

    def segment(self, run: int) -> Segment:
        assert self.ends is not None, "told from the beginning"
        return Segment(transpose(self._convolution.transfer(self._inputs, run)), self.ends[run])
