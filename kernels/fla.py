"""Both families by flash-linear-attention's operators, on a GPU, behind the stages that ours have: to compare numbers.

Its operators take the state that enters a sequence, return the one that leaves it, and differentiate by themselves. To
them every run is a sequence. Where our kernels correct a part of their work when a state arrives, these compute again,
and once more for the transfers of a delta rule.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from fla import ops
from torch import Tensor

from lasp.kernels.chain import Pass, SegmentChain
from lasp.kernels.decays import decay_factor, finite
from lasp.kernels.inputs import Gradients, Inputs
from lasp.kernels.recurrence import Recurrence

Operator = Callable[..., tuple[Tensor, Tensor]]


class RunStates(SegmentChain):
    """A chain in which every run is one segment. What stands for states at chunks is the subclass's own."""

    def __init__(self, recurrence: FlaRecurrence) -> None:
        super().__init__(tuple((run, run + 1) for run in range(len(recurrence.runs))))
        self.recurrence = recurrence

    @abstractmethod
    def compute(self, starts: Tensor | None) -> Pass:
        """One pass through all runs from the states, or gradients, that enter them."""

    def carry(self, starts: Tensor | None, store: bool) -> Pass:
        """The same, once where nothing enters."""
        done: Pass = self._once("alone", lambda: self.compute(None)) if starts is None else self.compute(starts)
        return done


class FlaStates(RunStates):
    """The states that enter and leave runs, and the output."""

    def __init__(self, recurrence: FlaRecurrence, inputs: Inputs) -> None:
        super().__init__(recurrence)
        self.inputs = inputs

    @property
    def output(self) -> Tensor:
        """[B, T, Ho, V], once what enters the runs is known."""
        output: Tensor = self._true[0]
        return output

    @property
    def entering(self) -> Tensor | None:
        """The states [runs, B, H, K, V] that enter the runs; None for zeros."""
        return self._entering

    def compute(self, starts: Tensor | None) -> Pass:
        """The output, nothing, and the states that leave."""
        output, ends = self.recurrence.run(self.inputs, starts)
        return output, None, ends

    def make_transfers(self) -> Tensor:
        return self.recurrence.transfers(self.inputs)


class FlaAdjoint(RunStates):
    """The gradients of these states, and with them those of the inputs. grad: of the output."""

    reverse = True

    def __init__(self, forwards: FlaStates, grad: Tensor) -> None:
        super().__init__(forwards.recurrence)
        self.forwards, self.grad = forwards, grad
        self._given = [x is not None and x.requires_grad for x in forwards.inputs]

    @property
    def gradients(self) -> Gradients:
        """Those of the inputs, once what enters the runs' ends is known."""
        found = iter(self._true[0])
        return Gradients(*(next(found) if given else None for given in self._given))

    def compute(self, ends: Tensor | None) -> Pass:
        """Gradients of the inputs, nothing, and those of the states that enter."""
        leaves, output, left = self._once("graph", self._differentiable)
        results, grads = ((output,), (self.grad,)) if ends is None else ((output, left), (self.grad, ends))
        start, *found = torch.autograd.grad(results, leaves, grads, retain_graph=True, materialize_grads=True)
        return found, None, start

    def _differentiable(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """The forward pass once more: what is differentiated, output, states that leave the runs."""
        recurrence, inputs, starts = self.recurrence, self.forwards.inputs, self.forwards.entering
        with torch.enable_grad():
            fresh = Inputs(*(_fresh(x) for x in inputs))
            starts = (recurrence.zeros(inputs) if starts is None else starts.detach()).requires_grad_()
            leaves = [x for x in (starts, *fresh) if x is not None and x.requires_grad]
            return leaves, *recurrence.run(fresh, starts)

    def make_transfers(self) -> Tensor:
        return self.forwards.transfers


class FlaRecurrence(Recurrence):
    """By flash-linear-attention. Only causal."""

    def states(self, inputs: Inputs) -> FlaStates:
        return FlaStates(self, inputs)

    def inside(self, inputs: Inputs, chain: FlaStates) -> None:
        """Nothing: the output is computed when the state is known."""

    def read_out(self, inputs: Inputs, entered: FlaStates, inside: None) -> Tensor:
        return entered.output

    def forward(self, inputs: Inputs, incoming: list[Tensor | None]) -> tuple[Tensor, FlaStates]:
        chain = self.states(inputs)
        chain.enter(incoming)
        return chain.output, chain

    def restore(self, inputs: Inputs, tensors: tuple[Tensor, ...]) -> FlaStates:
        return self.states(inputs).restore(tensors, filled=False)

    def adjoint(self, inputs: Inputs, grad: Tensor, entered: FlaStates) -> FlaAdjoint:
        return FlaAdjoint(entered, grad)

    def grad_outputs(self, inputs: Inputs, grad: Tensor, entered: FlaStates) -> None:
        """Nothing: all gradients are computed at once."""

    def grad_states(self, inputs: Inputs, entered: FlaStates, adjoint: FlaAdjoint, found: None) -> Gradients:
        return adjoint.gradients

    def backward(
        self, inputs: Inputs, grad: Tensor, entered: FlaStates, incoming: list[Tensor | None]
    ) -> tuple[Gradients, list[Tensor]]:
        adjoint = self.adjoint(inputs, grad, entered)
        adjoint.enter(incoming)
        return adjoint.gradients, adjoint.leaving()

    def run(self, inputs: Inputs, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output [B, T, Ho, V], and the states [runs, B, H, K, V] that leave the runs, given those that enter."""
        q, v = inputs.q, inputs.v
        batch, tokens = q.shape[:2]
        starts = self.zeros(inputs) if starts is None else starts
        # The operators want as many heads everywhere, and sequences one behind the other. They may lose count at empty
        # ones, which leave the state as it is.
        heads = max(q.shape[2], self.heads)
        full = [run for run, (_, length) in enumerate(self.runs) if length]
        if not full:  # nothing to launch, but something to differentiate
            return v.repeat_interleave(heads // v.shape[2], 2) + 0 * starts.sum(), starts
        operator, others = self._operator(inputs)
        named = {"q": q, "k": inputs.k, "v": v} | others
        bounds = [b * tokens + self.runs[run][0] for b in range(batch) for run in full] + [batch * tokens]
        output, ends = operator(
            **{name: None if x is None else _flat(x, heads) for name, x in named.items()},
            scale=self.scale,
            initial_state=starts[full].transpose(0, 1).flatten(0, 1).repeat_interleave(heads // self.heads, 1),
            output_final_state=True,
            cu_seqlens=torch.tensor(bounds, device=q.device),
        )
        ends = ends[:, :: heads // self.heads].unflatten(0, (batch, -1)).transpose(0, 1)
        if len(full) < len(self.runs):
            ends = starts.index_copy(0, torch.tensor(full, device=q.device), ends)
        return output.view(batch, tokens, heads, -1), ends

    def transfers(self, inputs: Inputs) -> Tensor:
        """What each run does to a state that enters it, [runs, B, H, 1 or K, 1 or K]."""
        return self._decays(inputs) if inputs.beta is None else self._erasures(inputs, inputs.beta)

    def zeros(self, inputs: Inputs) -> Tensor:
        """States [runs, B, H, K, V] of empty memories."""
        k, v = inputs.k, inputs.v
        shape = len(self.runs), k.shape[0], self.heads, k.shape[3], v.shape[3]
        return torch.zeros(shape, dtype=torch.float32, device=k.device)

    def _operator(self, inputs: Inputs) -> tuple[Operator, dict[str, Tensor | None]]:
        """The operator, and what it takes besides queries, keys and values."""
        gates, beta = _gates(inputs), inputs.beta
        channels = gates is not None and gates.dim() == 4
        if beta is None:
            return ops.chunk_gla if channels else ops.chunk_simple_gla, {"g": gates}
        if channels:
            return ops.chunk_kda, {"g": gates, "beta": beta}
        if gates is None and inputs.q.dtype != torch.float32:
            return ops.chunk_delta_rule, {"beta": beta}
        # The delta rule without gates takes no fp32 there.
        return ops.chunk_gated_delta_rule, {"g": torch.zeros_like(beta) if gates is None else gates, "beta": beta}

    def _decays(self, inputs: Inputs) -> Tensor:
        """Of the decay family: the decay over each run, [runs, B, H, 1 or K, 1]."""
        gates = _gates(inputs)
        if gates is None:
            return self.zeros(inputs)[..., :1, :1] + 1
        gates = gates.unsqueeze(-1) if gates.dim() == 3 else gates
        sums = torch.stack([gates[:, first : first + length].sum(1) for first, length in self.runs])
        return decay_factor(sums).repeat_interleave(self.heads // gates.shape[2], 2).unsqueeze(-1)

    def _erasures(self, inputs: Inputs, beta: Tensor) -> Tensor:
        """Of the delta family: what each run makes of the identity when it writes nothing, without short operands."""
        k = inputs.k.float()
        identity = torch.eye(k.shape[3], dtype=k.dtype, device=k.device)
        starts = identity.expand(len(self.runs), k.shape[0], self.heads, -1, -1)
        return self.run(Inputs(k, k, torch.zeros_like(k), inputs.log_decay, beta.float()), starts)[1]


def _gates(inputs: Inputs) -> Tensor | None:
    """Log-decays of every token, [B, T, HG] or [B, T, HG, K], in fp32."""
    log_decay = inputs.log_decay
    if log_decay is None:
        return None
    log_decay = finite(log_decay.float())
    return log_decay.expand(*inputs.q.shape[:2], -1) if log_decay.dim() == 1 else log_decay


def _fresh(x: Any) -> Any:
    """A leaf of a graph of its own."""
    return None if x is None else x.detach().requires_grad_(x.requires_grad)


def _flat(x: Tensor, heads: int) -> Tensor:
    """[B, T, H, ...] as [1, B·T, heads, ...], each head as often as it is shared."""
    return x.repeat_interleave(heads // x.shape[2], 2).flatten(0, 1).unsqueeze(0)
