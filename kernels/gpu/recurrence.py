"""A recurrence by Triton's kernels, set up for one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lasp.kernels.gpu import operators
from lasp.kernels.gpu.states import Adjoint, Arranged, Solved, States
from lasp.kernels.gpu.table import processors
from lasp.kernels.inputs import Gradients, Inputs
from lasp.kernels.recurrence import Recurrence


class Ahead(NamedTuple):
    """What is known of the output before the states are, in fp32: what queries see inside their chunk, [B, T, HO, V],
    and of the delta family what reads the entering state for each, [B, T, HO, K]: the query less what was erased."""

    output: Tensor
    readers: Tensor | None


class TritonRecurrence(Recurrence):
    """On a GPU."""

    def states(self, inputs: Inputs) -> States:
        return States(Arranged(inputs, self, processors(inputs.q.device)))

    def inside(self, inputs: Inputs, chain: States) -> Ahead | None:
        """What attention within chunks gives where no state enters them; None without a mask."""
        own = chain.own
        if not self.causal:
            return None
        if own.solved is None:
            return Ahead(self._attend(chain, None, None, torch.float32), None)
        seen = operators.attend(own.q, own.k, own.solved.written, None, None, own.setting, True, torch.float32)
        return Ahead(seen, _readers(own, own.solved))

    def read_out(self, inputs: Inputs, entered: States, inside: Ahead | None) -> Tensor:
        if inside is None or inside.readers is None:
            return self._attend(entered, entered.states, None if inside is None else inside.output, inputs.v.dtype)
        own, plain = entered.own, entered.own.setting._replace(sums=None, scale=1.0)
        before, states = inside.output, entered.states
        output: Tensor = operators.attend(inside.readers, own.k, own.v, states, before, plain, False, inputs.v.dtype)
        return output

    def forward(self, inputs: Inputs, incoming: list[Tensor | None]) -> tuple[Tensor, States]:
        chain = self.states(inputs)
        chain.enter(incoming)
        return self._attend(chain, chain.states, None, inputs.v.dtype), chain

    def restore(self, inputs: Inputs, tensors: tuple[Tensor, ...]) -> States:
        return self.states(inputs).restore(tensors, filled=not self.causal)

    def adjoint(self, inputs: Inputs, grad: Tensor, entered: States) -> Adjoint:
        return Adjoint(entered, grad)

    def grad_outputs(self, inputs: Inputs, grad: Tensor, entered: States) -> Gradients:
        return gradients(entered, grad.contiguous(), None)

    def grad_states(self, inputs: Inputs, entered: States, adjoint: Adjoint, found: Gradients) -> Gradients:
        return found.plus(gradients(entered, None, adjoint)).like(inputs)

    def backward(
        self, inputs: Inputs, grad: Tensor, entered: States, incoming: list[Tensor | None]
    ) -> tuple[Gradients, list[Tensor]]:
        adjoint = self.adjoint(inputs, grad, entered)
        adjoint.enter(incoming)
        return gradients(entered, adjoint.grad, adjoint).like(inputs), adjoint.leaving()

    def _attend(self, chain: States, states: Tensor | None, before: Tensor | None, dtype: torch.dtype) -> Tensor:
        own, inside = chain.own, self.causal and before is None
        output: Tensor = operators.attend(own.q, own.k, chain.values, states, before, own.setting, inside, dtype)
        return output


def _readers(own: Arranged, solved: Solved) -> Tensor:
    """`scale·(Q' - P·W)`, with the queries decayed from their chunk's start, and P what they see of its keys."""
    setting, heads = own.setting, max(own.setting.heads, own.q.shape[2])
    queries = own.q.repeat_interleave(heads // own.q.shape[2], 2).float() * setting.scale
    if setting.sums is not None:
        queries.mul_(setting.sums.exp().repeat_interleave(heads // setting.sums.shape[2], 2))
    erased = setting._replace(scale=-setting.scale)
    readers: Tensor = operators.attend(own.q, own.k, solved.erased, None, queries, erased, True, torch.float32)
    return readers


def gradients(entered: States, grad: Tensor | None, adjoint: Adjoint | None) -> Gradients:
    """Per state: from the output's gradient, from the gradients of states that leave the chunks, or from both."""
    if entered.own.solved is None:
        return _decay_gradients(entered, grad, adjoint)
    return _delta_gradients(entered, entered.own.solved, grad, adjoint)


def _decay_gradients(entered: States, grad: Tensor | None, adjoint: Adjoint | None) -> Gradients:
    own, setting = entered.own, entered.own.setting
    whole = grad is not None and adjoint is not None
    alike = {x.shape[2] for x in (own.q, own.k, own.v)} == {setting.heads}
    dtype = own.v.dtype if whole and alike else torch.float32  # what is summed later is not rounded before
    grad_states, inside = None if adjoint is None else adjoint.states, setting.causal and grad is not None
    found = _key_gradients(entered, grad, grad_states, dtype)
    given = own.v if grad is None else grad
    return found._replace(v=operators.grad_values(own.q, own.k, given, grad_states, setting, inside, dtype))


def _delta_gradients(entered: States, solved: Solved, grad: Tensor | None, adjoint: Adjoint | None) -> Gradients:
    """That of v follows from that of what the tokens write, known with `adjoint`."""
    found = _key_gradients(entered, grad, None if adjoint is None else adjoint.states, torch.float32)
    return found if adjoint is None else found.plus(_written_gradients(entered, solved, adjoint.written))


def _key_gradients(entered: States, grad: Tensor | None, grad_states: Tensor | None, dtype: torch.dtype) -> Gradients:
    """Of queries, keys and gates, given what the tokens write."""
    own = entered.own
    dq, dk, gates = operators.grad_keys(
        own.q, own.k, entered.values, grad, entered.states, grad_states, own.setting, dtype
    )
    return Gradients(None if grad is None else dq, dk, log_decay=gates if own.setting.trained else None)


def _written_gradients(entered: States, solved: Solved, du: Tensor) -> Gradients:
    """Of values, rates, keys and gates, from the gradient of what the tokens write.

    Keys read the state and earlier keys just as queries do, without scale and without themselves: `error = v - K' S -
    A u` is such an output, `dv` minus its gradient.
    """
    own, dtype = entered.own, torch.float32
    setting = own.setting._replace(scale=-1.0, strict=True)
    shared = setting.heads // own.v.shape[2]
    asked = own.v if shared == 1 else own.v.repeat_interleave(shared, 2)
    error = operators.attend(own.k, own.k, entered.values, entered.states, asked, setting, True, dtype)
    dv, dbeta = operators.grad_solve(solved.inverse, own.beta, du, error, setting.chunks)
    rows, columns, gates = operators.grad_keys(own.k, own.k, entered.values, dv, entered.states, None, setting, dtype)
    return Gradients(None, rows + columns, dv, gates if setting.trained else None, dbeta)
