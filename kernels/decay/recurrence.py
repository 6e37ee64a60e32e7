"""The decay family set up for one call: what `parallel/linear.py` joins to a scan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lasp.kernels.decay.chunked import ChunkStates, DecayStages, Gradients
from lasp.kernels.decay.scores import decay_factor, finite
from lasp.kernels.decay.tiles import Geometry, Inputs
from lasp.kernels.documents import chunk_table
from lasp.kernels.precision import compute_dtype

Grads = tuple[Tensor | None, ...]  # of q, k, v, log_decay and what else a family has

CHUNK_SIZE = 64
# Without a mask a chunk has no inside: long ones only save states.
UNMASKED_CHUNK_SIZE = 1024
# Rows (tokens x states) to a block: fewer cost more in calls than they save in cache misses.
BLOCK_ROWS = 8192


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


@dataclass(frozen=True)
class DecayRecurrence(DecayCall):
    """A call by the stages of `chunked.py`, in plain PyTorch."""

    stages: ClassVar[DecayStages] = DecayStages()

    def states(self, inputs: Inputs) -> ChunkStates:
        """States between chunks, each run from an empty memory."""
        chain: ChunkStates = self.stages.chunk_states(inputs, self._geometry(inputs))
        return chain

    def inside(self, inputs: Inputs, chain: ChunkStates) -> Tensor:
        """The output of attention within chunks."""
        output: Tensor = self.stages.inside(inputs, self._geometry(inputs))
        return output

    def read_out(self, inputs: Inputs, entered: ChunkStates, output: Tensor) -> Tensor:
        """The whole output, in v's dtype. `output` is overwritten."""
        self.stages.read_out(inputs, entered, output, self._geometry(inputs))
        return output.to(inputs[2].dtype)

    def forward(self, inputs: Inputs, incoming: list[Tensor | None]) -> tuple[Tensor, ChunkStates]:
        """The output and the true states at once, where the state entering each run is known."""
        output, chain = self.stages.forward(inputs, incoming, self._geometry(inputs))
        return output.to(inputs[2].dtype), chain

    def adjoint(self, inputs: Inputs, grad: Tensor, entered: ChunkStates) -> ChunkStates:
        """Gradients of the states between chunks, each run with nothing after it."""
        chain: ChunkStates = self.stages.adjoint_states(inputs, grad, entered, self._geometry(inputs))
        return chain

    def grad_outputs(self, inputs: Inputs, grad: Tensor, entered: ChunkStates) -> Gradients:
        """The gradients as far as they do not depend on later tokens' gradients."""
        total: Gradients = self.stages.grad_outputs(inputs, grad, entered, self._geometry(inputs))
        return total

    def grad_states(self, inputs: Inputs, entered: ChunkStates, adjoint: ChunkStates, total: Gradients) -> Grads:
        """All gradients, each in its input's shape and dtype. `total` is overwritten."""
        self.stages.grad_chunk_states(inputs, entered, adjoint, total, self._geometry(inputs))
        return self.like_inputs(total, inputs)

    def backward(
        self, inputs: Inputs, grad: Tensor, entered: ChunkStates, incoming: list[Tensor | None]
    ) -> tuple[Grads, list[Tensor]]:
        """All gradients, and that of the state entering each run, where the gradient entering its end is known."""
        total, starts = self.stages.backward(inputs, grad, entered, incoming, self._geometry(inputs))
        return self.like_inputs(total, inputs), starts

    def restore(self, inputs: Inputs, tensors: tuple[Tensor, ...]) -> ChunkStates:
        """A chain from its tensors."""
        states, transfers = tensors
        return ChunkStates(self._geometry(inputs), states, transfers)

    def _geometry(self, inputs: Inputs) -> Geometry:
        q, v = inputs[0], inputs[2]
        block_chunks = max(1, BLOCK_ROWS // (self.chunk_size * q.shape[0] * self.heads))
        return Geometry(
            chunk_table(self.runs, self.chunk_size, block_chunks),
            batch=q.shape[0],
            heads=self.heads,
            key_dim=q.shape[3],
            value_dim=v.shape[3],
            scale=self.scale,
            dtype=compute_dtype(q),
            masked=self.causal,
        )
