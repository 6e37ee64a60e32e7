"""Both families by flash-linear-attention's operators, behind the stages that ours have: to compare numbers.

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

from lasp.kernels.decay.recurrence import DecayCall, Grads
from lasp.kernels.decay.scores import decay_factor, finite
from lasp.kernels.decay.segments import Pass, SegmentStates
from lasp.kernels.delta.recurrence import DeltaCall

Operator = Callable[..., tuple[Tensor, Tensor]]


class RunStates(SegmentStates):
    """A chain in which every run is one segment. What stands for states at chunks is the subclass's own."""

    def __init__(self, call: FlaDecay) -> None:
        super().__init__(tuple((run, run + 1) for run in range(len(call.runs))))
        self.call = call

    @abstractmethod
    def compute(self, starts: Tensor | None) -> Pass:
        """One pass through all runs from the states, or gradients, that enter them."""

    def carry(self, starts: Tensor | None, store: bool) -> Pass:
        """The same, once where nothing enters."""
        done: Pass = self._once("alone", lambda: self.compute(None)) if starts is None else self.compute(starts)
        return done


class FlaStates(RunStates):
    """The states that enter and leave runs, and the output."""

    def __init__(self, call: FlaDecay, inputs: Any) -> None:
        super().__init__(call)
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
        output, ends = self.call.run(self.inputs, starts)
        return output, None, ends

    def make_transfers(self) -> Tensor:
        return self.call.transfers(self.inputs)


class FlaAdjoint(RunStates):
    """The gradients of these states, and with them those of the inputs. grad: of the output."""

    reverse = True

    def __init__(self, forwards: FlaStates, grad: Tensor) -> None:
        super().__init__(forwards.call)
        self.forwards, self.grad = forwards, grad
        self._given = [x is not None and x.requires_grad for x in forwards.inputs]

    @property
    def gradients(self) -> Grads:
        """Those of the inputs, once what enters the runs' ends is known."""
        found = iter(self._true[0])
        return tuple(next(found) if given else None for given in self._given)

    def compute(self, ends: Tensor | None) -> Pass:
        """Gradients of the inputs, nothing, and those of the states that enter."""
        leaves, output, left = self._once("graph", self._differentiable)
        results, grads = ((output,), (self.grad,)) if ends is None else ((output, left), (self.grad, ends))
        start, *found = torch.autograd.grad(results, leaves, grads, retain_graph=True, materialize_grads=True)
        return found, None, start

    def _differentiable(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """The forward pass once more: what is differentiated, output, states that leave the runs."""
        call, inputs, starts = self.call, self.forwards.inputs, self.forwards.entering
        with torch.enable_grad():
            fresh = [x if x is None else x.detach().requires_grad_(x.requires_grad) for x in inputs]
            starts = (call.zeros(inputs) if starts is None else starts.detach()).requires_grad_()
            leaves = [x for x in (starts, *fresh) if x is not None and x.requires_grad]
            return leaves, *call.run(fresh, starts)

    def make_transfers(self) -> Tensor:
        return self.forwards.transfers


class FlaDecay(DecayCall):
    """What `DecayRecurrence` computes, by flash-linear-attention. Only causal."""

    def states(self, inputs: Any) -> FlaStates:
        """States, each run from an empty memory."""
        return FlaStates(self, inputs)

    def inside(self, inputs: Any, chain: FlaStates) -> None:
        """Nothing: the output is computed when the state is known."""

    def read_out(self, inputs: Any, entered: FlaStates, inside: None) -> Tensor:
        """The whole output, in v's dtype."""
        return entered.output

    def forward(self, inputs: Any, incoming: list[Tensor | None]) -> tuple[Tensor, FlaStates]:
        """The output and the true states at once, where the state entering each run is known."""
        chain = self.states(inputs)
        chain.enter(incoming)
        return chain.output, chain

    def adjoint(self, inputs: Any, grad: Tensor, entered: FlaStates) -> FlaAdjoint:
        """Gradients of the states, each run with nothing after it."""
        return FlaAdjoint(entered, grad)

    def grad_outputs(self, inputs: Any, grad: Tensor, entered: FlaStates) -> None:
        """Nothing: all gradients are computed at once."""

    def grad_states(self, inputs: Any, entered: FlaStates, adjoint: FlaAdjoint, total: None) -> Grads:
        """All gradients, each in its input's shape and dtype."""
        return adjoint.gradients

    def backward(
        self, inputs: Any, grad: Tensor, entered: FlaStates, incoming: list[Tensor | None]
    ) -> tuple[Grads, list[Tensor]]:
        """All gradients, and that of the state entering each run, where the gradient entering its end is known."""
        adjoint = self.adjoint(inputs, grad, entered)
        adjoint.enter_backwards(incoming)
        return adjoint.gradients, adjoint.starts()

    def restore(self, inputs: Any, tensors: tuple[Tensor, ...]) -> FlaStates:
        """A chain from its tensors."""
        chain = self.states(inputs)
        chain.restore(tensors, filled=False)
        return chain

    def run(self, inputs: Any, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output [B, T, Ho, V], and the states [runs, B, H, K, V] that leave the runs, given those that enter."""
        q, v = inputs[0], inputs[2]
        batch, tokens = q.shape[:2]
        starts = self.zeros(inputs) if starts is None else starts
        # The operators want as many heads everywhere, and sequences one behind the other. They may lose count at empty
        # ones, which leave the state as it is.
        heads = max(q.shape[2], self.heads)
        full = [run for run, (_, length) in enumerate(self.runs) if length]
        if not full:  # nothing to launch, but something to differentiate
            return v.repeat_interleave(heads // v.shape[2], 2) + 0 * starts.sum(), starts
        operator, others = self.operator(inputs)
        named = {"q": q, "k": inputs[1], "v": v} | others
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

    def operator(self, inputs: Any) -> tuple[Operator, dict[str, Tensor | None]]:
        """The operator, and what it takes besides queries, keys and values."""
        gates = self.gates(inputs)
        if gates is not None and gates.dim() == 4:
            return ops.chunk_gla, {"g": gates}
        return ops.chunk_simple_gla, {"g": gates}

    def gates(self, inputs: Any) -> Tensor | None:
        """Log-decays of every token, [B, T, HG] or [B, T, HG, K], in fp32."""
        log_decay: Tensor | None = inputs[3]
        if log_decay is None:
            return None
        log_decay = finite(log_decay.float())
        return log_decay.expand(*inputs[0].shape[:2], -1) if log_decay.dim() == 1 else log_decay

    def transfers(self, inputs: Any) -> Tensor:
        """What each run does to a state that enters it, [runs, B, H, 1 or K, 1]."""
        gates = self.gates(inputs)
        if gates is None:
            return self.zeros(inputs)[..., :1, :1] + 1
        gates = gates.unsqueeze(-1) if gates.dim() == 3 else gates
        sums = torch.stack([gates[:, first : first + length].sum(1) for first, length in self.runs])
        return decay_factor(sums).repeat_interleave(self.heads // gates.shape[2], 2).unsqueeze(-1)

    def zeros(self, inputs: Any) -> Tensor:
        """States [runs, B, H, K, V] of empty memories."""
        k, v = inputs[1:3]
        shape = len(self.runs), k.shape[0], self.heads, k.shape[3], v.shape[3]
        return torch.zeros(shape, dtype=torch.float32, device=k.device)


class FlaDelta(DeltaCall, FlaDecay):
    """What `DeltaRecurrence` computes, by flash-linear-attention."""

    def operator(self, inputs: Any) -> tuple[Operator, dict[str, Tensor | None]]:
        """The operator, and what it takes besides queries, keys and values."""
        gates, rates = self.gates(inputs), inputs[4]
        if gates is not None and gates.dim() == 4:
            return ops.chunk_kda, {"g": gates, "beta": rates}
        if gates is None and inputs[0].dtype != torch.float32:
            return ops.chunk_delta_rule, {"beta": rates}
        # The delta rule without gates takes no fp32 there.
        return ops.chunk_gated_delta_rule, {"g": torch.zeros_like(rates) if gates is None else gates, "beta": rates}

    def transfers(self, inputs: Any) -> Tensor:
        """What each run makes of the identity when it writes nothing, [runs, B, H, K, K], without short operands."""
        k, log_decay, rates = inputs[1].float(), inputs[3], inputs[4].float()
        identity = torch.eye(k.shape[3], dtype=k.dtype, device=k.device)
        starts = identity.expand(len(self.runs), k.shape[0], self.heads, -1, -1)
        return self.run((k, k, torch.zeros_like(k), log_decay, rates), starts)[1]


def _flat(x: Tensor, heads: int) -> Tensor:
    """[B, T, H, ...] as [1, B·T, heads, ...], each head as often as it is shared."""
    return x.repeat_interleave(heads // x.shape[2], 2).flatten(0, 1).unsqueeze(0)
