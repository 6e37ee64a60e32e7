"""The decay family set up for one call: what `parallel/linear.py` joins to a scan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lasp.kernels.decay.chunked import ChunkStates, DecayStages, Gradients
from lasp.kernels.decay.scores import decay_factor, finite
from lasp.kernels.decay.stages import Operator, stage_operators
from lasp.kernels.decay.tiles import Inputs
from lasp.kernels.documents import state_slots
from lasp.kernels.precision import compute_dtype

Grads = tuple[Tensor | None, ...]  # of q, k, v, log_decay and what else a family has

CHUNK_SIZE = 64
# Without a mask a chunk has no inside: long ones only save states.
UNMASKED_CHUNK_SIZE = 1024


@dataclass(frozen=True)
class DecayCall:
    """`S_t = diag(exp(log_decay_t))·S_{t-1} + k_t v_t^T`, `o_t = scale·S_t^T q_t`, over runs of local tokens.

    runs: (offset, length) each; heads: the number of states; causal: a token reads the state up to itself, else that
    of its whole document.
    """

    runs: tuple[tuple[int, int], ...]
    heads: int
    scale: float
    causal: bool
    chunk_size: int

    def transfer_rule(self, inputs: Inputs) -> Callable[[int], Tensor] | None:
        """A link's transfer from its number of tokens: none where gates differ from token to token."""
        q, log_decay = inputs[0], inputs[3]
        dtype = compute_dtype(q)
        if log_decay is None:
            one = torch.ones(1, 1, 1, 1, dtype=dtype, device=q.device)
            return lambda length: one
        if log_decay.dim() > 1:
            return None
        per_head = finite(log_decay.to(dtype)).repeat_interleave(self.heads // log_decay.shape[0]).view(1, -1, 1, 1)
        return lambda length: decay_factor(per_head * length)

    def like_inputs(self, total: Gradients, inputs: Inputs) -> Grads:
        """The gradients in the shape and dtype of the inputs."""
        q, k, v, log_decay = inputs[:4]
        dgates = None
        if log_decay is not None and total.log_decay is not None:
            dgates = total.log_decay.sum((0, 1)) if log_decay.dim() == 1 else total.log_decay
            dgates = dgates.view(log_decay.shape).to(log_decay.dtype)
        return total.q.to(q.dtype), total.k.to(k.dtype), total.v.to(v.dtype), dgates


class DecayRecurrence(DecayCall):
    """A call by the stages of `chunked.py`, in plain PyTorch."""

    operators: ClassVar[dict[str, Operator]] = stage_operators("decay", DecayStages())

    def states(self, inputs: Inputs) -> ChunkStates:
        """States between chunks, each run from an empty memory."""
        return ChunkStates(self._slots, *self._stage("chunk_states", inputs))

    def inside(self, inputs: Inputs, chain: ChunkStates) -> Tensor:
        """The output of attention within chunks."""
        (output,) = self._stage("inside", inputs)
        return output

    def read_out(self, inputs: Inputs, entered: ChunkStates, inside: Tensor) -> Tensor:
        """The whole output, in v's dtype."""
        (output,) = self._stage("read_out", inputs, *entered.tensors(), inside)
        return output

    def forward(self, inputs: Inputs, incoming: list[Tensor | None]) -> tuple[Tensor, ChunkStates]:
        """The output and the true states at once, where the state entering each run is known."""
        output, *chain = self._stage("forward", inputs, *incoming)
        return output, ChunkStates(self._slots, *chain)

    def adjoint(self, inputs: Inputs, grad: Tensor, entered: ChunkStates) -> ChunkStates:
        """Gradients of the states between chunks, each run with nothing after it."""
        (states,) = self._stage("adjoint_states", inputs, grad, entered.transfers)
        return ChunkStates(self._slots, states, entered.transfers)

    def grad_outputs(self, inputs: Inputs, grad: Tensor, entered: ChunkStates) -> list[Tensor]:
        """The gradients as far as they do not depend on later tokens' gradients."""
        return self._stage("grad_outputs", inputs, grad, *entered.tensors())

    def grad_states(self, inputs: Inputs, entered: ChunkStates, adjoint: ChunkStates, found: list[Tensor]) -> Grads:
        """All gradients, each in its input's shape and dtype."""
        total = self._stage("grad_chunk_states", inputs, *entered.tensors(), adjoint.states, *found)
        return self.like_inputs(Gradients.of((found[0], *total), trains_gates(inputs)), inputs)

    def backward(
        self, inputs: Inputs, grad: Tensor, entered: ChunkStates, incoming: list[Tensor | None]
    ) -> tuple[Grads, list[Tensor]]:
        """All gradients, and that of the state entering each run, where the gradient entering its end is known."""
        *total, starts = self._stage("backward", inputs, grad, *entered.tensors(), *incoming)
        return self.like_inputs(Gradients.of(total, trains_gates(inputs)), inputs), list(starts.unbind())

    def restore(self, inputs: Inputs, tensors: tuple[Tensor, ...]) -> ChunkStates:
        """A chain from its tensors."""
        return ChunkStates(self._slots, *tensors)

    @property
    def _slots(self) -> tuple[tuple[int, int], ...]:
        return state_slots(self.runs, self.chunk_size)

    def _stage(self, name: str, inputs: Inputs, *given: Tensor | None) -> list[Tensor]:
        runs = [number for run in self.runs for number in run]
        numbers = runs, self.heads, self.scale, self.causal, self.chunk_size, trains_gates(inputs)
        return self.operators[name](list(inputs), list(given), *numbers)


def trains_gates(inputs: Inputs) -> bool:
    """Whether the gates have a gradient: those of Lightning and RetNet are constants."""
    return inputs[3] is not None and bool(inputs[3].requires_grad)
