"""A recurrence by the stages of this folder, set up for one call."""

from __future__ import annotations

from torch import Tensor

from lasp.kernels.chunks import state_slots
from lasp.kernels.inputs import Gradients, Inputs
from lasp.kernels.portable import stages
from lasp.kernels.portable.chain import ChunkChain
from lasp.kernels.portable.stages import Numbers, gradients_of
from lasp.kernels.recurrence import Recurrence


class PortableRecurrence(Recurrence):
    """In plain PyTorch, chunk by chunk."""

    def states(self, inputs: Inputs) -> ChunkChain:
        return self._chain(stages.chunk_states(inputs, self._numbers(inputs)))

    def inside(self, inputs: Inputs, chain: ChunkChain) -> list[Tensor]:
        """The output of attention within chunks; of the delta family also what will read the entering states."""
        found: list[Tensor] = stages.inside(inputs, self._numbers(inputs))
        return found

    def read_out(self, inputs: Inputs, entered: ChunkChain, inside: list[Tensor]) -> Tensor:
        (output,) = stages.read_out(inputs, self._numbers(inputs), entered.tensors(), inside)
        return output

    def forward(self, inputs: Inputs, incoming: list[Tensor | None]) -> tuple[Tensor, ChunkChain]:
        output, *chain = stages.forward(inputs, self._numbers(inputs), incoming)
        return output, self._chain(chain)

    def restore(self, inputs: Inputs, tensors: tuple[Tensor, ...]) -> ChunkChain:
        return self._chain(tensors)

    def adjoint(self, inputs: Inputs, grad: Tensor, entered: ChunkChain) -> ChunkChain:
        (states,) = stages.adjoint_states(inputs, self._numbers(inputs), grad, entered.transfers)
        return ChunkChain(self._slots, states, entered.transfers, reverse=True)

    def grad_outputs(self, inputs: Inputs, grad: Tensor, entered: ChunkChain) -> list[Tensor]:
        found: list[Tensor] = stages.grad_outputs(inputs, self._numbers(inputs), grad, entered.tensors())
        return found

    def grad_states(self, inputs: Inputs, entered: ChunkChain, adjoint: ChunkChain, found: list[Tensor]) -> Gradients:
        numbers = self._numbers(inputs)
        rest = stages.grad_chunk_states(inputs, numbers, entered.tensors(), adjoint.states, found)
        return gradients_of((found[0], *rest), inputs.trained).like(inputs)

    def backward(
        self, inputs: Inputs, grad: Tensor, entered: ChunkChain, incoming: list[Tensor | None]
    ) -> tuple[Gradients, list[Tensor]]:
        *found, starts = stages.backward(inputs, self._numbers(inputs), grad, entered.tensors(), incoming)
        return gradients_of(found, inputs.trained).like(inputs), list(starts.unbind())

    @property
    def _slots(self) -> tuple[tuple[int, int], ...]:
        return state_slots(self.runs, self.chunk_size)

    def _chain(self, tensors: list[Tensor] | tuple[Tensor, ...]) -> ChunkChain:
        return ChunkChain(self._slots, *tensors)

    def _numbers(self, inputs: Inputs) -> Numbers:
        runs = [number for run in self.runs for number in run]
        return Numbers(runs, self.heads, self.scale, self.causal, self.chunk_size, inputs.trained)
