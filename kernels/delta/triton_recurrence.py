"""The delta family on a GPU, set up for one call: the decay family's kernels, with what tokens write for values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lasp.kernels.decay import operators
from lasp.kernels.decay.segments import Pass
from lasp.kernels.decay.table import processors
from lasp.kernels.decay.triton_recurrence import Arranged, DecayAdjoint, DecayStates, StateGradients, TritonDecay
from lasp.kernels.delta.operators import grad_solve, solve
from lasp.kernels.delta.recurrence import DeltaCall


class DeltaArranged(Arranged):
    """The inputs of a call, and the solved systems of its chunks."""

    def __init__(self, inputs: Any, call: DeltaCall, at_once: int) -> None:
        super().__init__(inputs, call, at_once)
        self.beta = inputs[4].contiguous()
        self.inverse, self.written, self.erased = solve(
            self.k, self.v, self.beta, self.sums, self.table.chunks, self.heads, self.size
        )


class DeltaStates(DecayStates):
    """The states of the delta family."""

    own: DeltaArranged

    @property
    def values(self) -> Tensor:
        """What the tokens write, [B, T, H, V]."""
        return self.written

    def carry(self, starts: Tensor | None, store: bool) -> Pass:
        own = self.own
        table = own.table.chunks, own.table.segments
        done: Pass = operators.carry(own.k, own.written, own.sums, own.erased, starts, *table, *own.shape, store, False)
        return done

    def make_transfers(self) -> Tensor:
        """The same recurrence without values, from the identity, and without short operands."""
        own, dim = self.own, self.own.k.shape[3]
        eye = torch.eye(dim, device=own.k.device).expand(len(own.table.segments), own.k.shape[0], own.heads, -1, -1)
        table = own.table.chunks, own.table.segments
        options = own.heads, dim, own.size, False, True
        transfers: Tensor = operators.carry(own.k, None, own.sums, own.erased, eye.contiguous(), *table, *options)[2]
        return transfers


class DeltaAdjoint(DecayAdjoint):
    """Their gradients."""

    own: DeltaArranged

    def __init__(self, forwards: DeltaStates, grad: Tensor) -> None:
        super().__init__(forwards, grad)
        own = self.own
        # The gradient of what the tokens write, as far as it comes from their chunk.
        self._grad_inside: Tensor = operators.grad_values(
            own.q, own.k, self.grad, own.sums, None, own.table.chunks, own.heads, own.scale, own.size, True,
            torch.float32,
        )  # fmt: skip

    def carry(self, starts: Tensor | None, store: bool) -> Pass:
        own = self.own
        table = own.table.chunks, own.table.segments
        done: Pass = operators.carry_back(
            own.q, own.k, self.grad, own.sums, own.erased, self._grad_inside, starts, *table, own.heads, own.scale,
            own.size, store,
        )  # fmt: skip
        return done


class TritonDelta(DeltaCall, TritonDecay):
    """What `DeltaRecurrence` computes, by Triton's kernels."""

    def states(self, inputs: Any) -> DeltaStates:
        """States, each run from an empty memory."""
        return DeltaStates(DeltaArranged(inputs, self, processors(inputs[0].device)))

    def inside(self, inputs: Any, chain: DecayStates) -> Tensor | None:
        """None: what tokens write is known when the state is, and the output is computed at once."""
        return None

    def adjoint(self, inputs: Any, grad: Tensor, entered: Any) -> DeltaAdjoint:
        """Gradients of the states, each run with nothing after it."""
        return DeltaAdjoint(entered, grad)

    def _gradients(self, entered: Any, grad: Tensor | None, adjoint: Any) -> StateGradients:
        """As for the decay family; that of v follows from that of what the tokens write, known with `adjoint`."""
        grad_states = None if adjoint is None else adjoint.states
        dq, dk, gates = self._grad_keys(entered, grad, grad_states, torch.float32)
        if adjoint is None:
            return StateGradients(dq, dk, None, gates)
        dv, dbeta, own_dk, own_gates = self._grad_written(entered, adjoint.written)
        return StateGradients(dq, dk, None, gates).plus(StateGradients(dq, own_dk, dv, own_gates, dbeta))

    def _grad_written(self, entered: DeltaStates, du: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of values, rates, keys and gates, from the gradient of what the tokens write.

        Keys read the state and earlier keys just as queries do, without scale and without themselves:
        `error = v - K' S - A u` is such an output, `dv` minus its gradient.
        """
        own = entered.own
        settings = own.table.chunks, own.heads, -1.0, own.size, True, True
        shared = own.heads // own.v.shape[2]
        asked = own.v if shared == 1 else own.v.repeat_interleave(shared, 2)
        error = operators.attend(
            own.k, own.k, entered.values, own.sums, entered.states, asked, *settings, torch.float32
        )
        dv, dbeta = grad_solve(own.inverse, own.beta, du, error, own.table.chunks)
        rows, columns, gates = operators.grad_keys(
            own.k, own.k, entered.values, dv, own.sums, entered.states, None, *settings, own.trained, torch.float32
        )
        return dv, dbeta, rows + columns, gates if own.trained else None
