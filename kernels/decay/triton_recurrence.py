"""The decay family on a GPU, set up for one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.kernels.decay import operators
from lasp.kernels.decay.chunked import Gradients
from lasp.kernels.decay.recurrence import DecayCall, Grads
from lasp.kernels.decay.segments import Pass, SegmentStates
from lasp.kernels.decay.table import device_table, processors

# Without a mask nothing is computed inside a chunk, whose length is then that of a tile.
LONGEST_CHUNK = 64


class StateGradients(NamedTuple):
    """Gradients per state, of queries per head of the output; None for what is not there (yet)."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    gates: Tensor | None
    beta: Tensor | None = None

    def plus(self, rest: StateGradients) -> StateGradients:
        """What two parts of a backward pass come to; the first has all of q's."""
        return StateGradients(self.q, *(_sum(a, b) for a, b in zip(self[1:], rest[1:], strict=True)))


def _sum(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


class Arranged:
    """The inputs of a call as the kernels take them."""

    def __init__(self, inputs: Any, call: DecayCall, at_once: int) -> None:
        self.q, self.k, self.v = (x.contiguous() for x in inputs[:3])
        self.heads, self.scale, self.causal = call.heads, call.scale, call.causal
        self.size = min(call.chunk_size, LONGEST_CHUNK)
        self.trained = inputs[3] is not None and inputs[3].requires_grad
        programs = self.q.shape[0] * self.heads * -(-self.q.shape[3] // 64) * -(-self.v.shape[3] // 64)
        self.table = device_table(call.runs, self.size, self.causal, programs, at_once, self.q.device)
        self.sums = None if inputs[3] is None else self._sum(inputs[3])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the integers that most operators take: heads of states, value channels, tokens to a chunk."""
        return self.heads, self.v.shape[3], self.size

    def _sum(self, gates: Tensor) -> Tensor:
        """The running sums of log-decays within chunks, [B, T, HG, 1 or K]."""
        gates = gates.expand(*self.q.shape[:2], -1) if gates.dim() == 1 else gates
        gates = gates.unsqueeze(-1) if gates.dim() == 3 else gates
        sums: Tensor = operators.sum_gates(gates.contiguous(), self.table.chunks, self.size)
        return sums

    def segment_decays(self) -> Tensor:
        """The decay over each segment, [segments, B, H, 1 or K, 1]."""
        count, batch = len(self.table.segments), self.q.shape[0]
        if self.sums is None:
            return torch.ones(count, batch, self.heads, 1, 1, device=self.q.device)
        first, length, _ = self.table.chunks.long().unbind(1)
        whole = self.sums[:, first + length - 1].movedim(1, 0)
        total = whole.new_zeros(count, *whole.shape[1:]).index_add_(0, self.table.owner, whole)
        return total.exp().repeat_interleave(self.heads // total.shape[2], 2).unsqueeze(-1)


class DecayStates(SegmentStates):
    """The states of the decay family."""

    def __init__(self, own: Arranged) -> None:
        super().__init__(own.table.runs)
        self.own = own

    @property
    def values(self) -> Tensor:
        """What the tokens write, [B, T, HV, V]."""
        return self.own.v

    def carry(self, starts: Tensor | None, store: bool) -> Pass:
        own = self.own
        table = own.table.chunks, own.table.segments
        done: Pass = operators.carry(own.k, own.v, own.sums, None, starts, *table, *own.shape, store, False)
        return done

    def make_transfers(self) -> Tensor:
        return self.own.segment_decays()


class DecayAdjoint(SegmentStates):
    """Their gradients. grad: of the output."""

    reverse = True

    def __init__(self, forwards: DecayStates, grad: Tensor) -> None:
        super().__init__(forwards.own.table.runs)
        self.forwards, self.own, self.grad = forwards, forwards.own, grad.contiguous()

    def carry(self, starts: Tensor | None, store: bool) -> Pass:
        own = self.own
        table = own.table.chunks, own.table.segments
        done: Pass = operators.carry_back(
            own.q, own.k, self.grad, own.sums, None, None, starts, *table, own.heads, own.scale, own.size, store
        )
        return done

    def make_transfers(self) -> Tensor:
        return self.forwards.transfers


class TritonDecay(DecayCall):
    """What `DecayRecurrence` computes, by Triton's kernels."""

    def states(self, inputs: Any) -> DecayStates:
        """States, each run from an empty memory."""
        return DecayStates(Arranged(inputs, self, processors(inputs[0].device)))

    def inside(self, inputs: Any, chain: DecayStates) -> Tensor | None:
        """The output of attention within chunks, in fp32; None without a mask."""
        return self._attend(chain, None, None, torch.float32) if self.causal else None

    def read_out(self, inputs: Any, entered: DecayStates, inside: Tensor | None) -> Tensor:
        """The whole output, in v's dtype."""
        return self._attend(entered, entered.states, inside, inputs[2].dtype)

    def forward(self, inputs: Any, incoming: list[Tensor | None]) -> tuple[Tensor, DecayStates]:
        """The output and the true states at once, where the state entering each run is known."""
        chain = self.states(inputs)
        chain.enter(incoming)
        return self._attend(chain, chain.states, None, inputs[2].dtype), chain

    def adjoint(self, inputs: Any, grad: Tensor, entered: DecayStates) -> DecayAdjoint:
        """Gradients of the states, each run with nothing after it."""
        return DecayAdjoint(entered, grad)

    def grad_outputs(self, inputs: Any, grad: Tensor, entered: DecayStates) -> StateGradients:
        """The gradients as far as they do not depend on later tokens' gradients."""
        return self._gradients(entered, grad.contiguous(), None)

    def grad_states(self, inputs: Any, entered: DecayStates, adjoint: DecayAdjoint, total: StateGradients) -> Grads:
        """All gradients, each in its input's shape and dtype."""
        return self._shaped(total.plus(self._gradients(entered, None, adjoint)), inputs)

    def backward(
        self, inputs: Any, grad: Tensor, entered: DecayStates, incoming: list[Tensor | None]
    ) -> tuple[Grads, list[Tensor]]:
        """All gradients, and that of the state entering each run, where the gradient entering its end is known."""
        adjoint = self.adjoint(inputs, grad, entered)
        adjoint.enter_backwards(incoming)
        return self._shaped(self._gradients(entered, adjoint.grad, adjoint), inputs), adjoint.starts()

    def restore(self, inputs: Any, tensors: tuple[Tensor, ...]) -> DecayStates:
        """A chain from its tensors."""
        chain = self.states(inputs)
        chain.restore(tensors, filled=not self.causal)
        return chain

    def _attend(self, chain: DecayStates, states: Tensor | None, before: Tensor | None, dtype: torch.dtype) -> Tensor:
        own, inside = chain.own, self.causal and before is None
        output: Tensor = operators.attend(
            own.q, own.k, chain.values, own.sums, states, before, own.table.chunks, self.heads, self.scale, own.size,
            inside, False, dtype,
        )  # fmt: skip
        return output

    def _gradients(self, entered: DecayStates, grad: Tensor | None, adjoint: DecayAdjoint | None) -> StateGradients:
        """Per state: from the output's gradient, from the gradients of states that leave the chunks, or from both."""
        own, whole = entered.own, grad is not None and adjoint is not None
        alike = {x.shape[2] for x in (own.q, own.k, own.v)} == {own.heads}
        dtype = own.v.dtype if whole and alike else torch.float32  # what is summed later is not rounded before
        grad_states = None if adjoint is None else adjoint.states
        dq, dk, gates = self._grad_keys(entered, grad, grad_states, dtype)
        dv = operators.grad_values(
            own.q, own.k, own.v if grad is None else grad, own.sums, grad_states, own.table.chunks, own.heads,
            own.scale, own.size, own.causal and grad is not None, dtype,
        )  # fmt: skip
        return StateGradients(dq, dk, dv, gates)

    def _grad_keys(
        self, entered: DecayStates, grad: Tensor | None, grad_states: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same of queries, keys and gates alone."""
        own, inside = entered.own, self.causal and grad is not None
        dq, dk, gates = operators.grad_keys(
            own.q, own.k, entered.values, grad, own.sums, entered.states, grad_states, own.table.chunks, own.heads,
            own.scale, own.size, inside, False, own.trained, dtype,
        )  # fmt: skip
        return dq, dk, gates if own.trained else None

    def _shaped(self, total: StateGradients, inputs: Any) -> Grads:
        """Summed over the states that share a head, in the shape and dtype of the inputs."""
        q, k, v, log_decay = inputs[:4]
        assert total.v is not None, "known by now"
        dq, dk, dv = by_head(total.q, q.shape[2]), by_head(total.k, k.shape[2]), by_head(total.v, v.shape[2])
        heads = 1 if log_decay is None else log_decay.shape[0 if log_decay.dim() == 1 else 2]
        gates = None if total.gates is None else by_head(total.gates, heads)
        beta = None if total.beta is None else by_head(total.beta, inputs[4].shape[2])
        return self.like_inputs(Gradients(dq, dk, dv, gates, beta), inputs)


def by_head(x: Tensor, heads: int) -> Tensor:
    """[B, T, H, D] summed over the states that share one of the heads."""
    return x if x.shape[2] == heads else x.unflatten(2, (heads, -1)).sum(3)
