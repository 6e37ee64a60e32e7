"""Recurrence: set up for one call, in stages that `parallel/linear.py` joins to a scan over ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lasp.kernels.chain import Chain
from lasp.kernels.decays import decay_factor, finite
from lasp.kernels.inputs import Gradients, Inputs
from lasp.kernels.precision import compute_dtype


@dataclass(frozen=True)
class Recurrence(ABC):
    """Over runs of local tokens, each from the state that enters it, `o_t = scale·S_t^T q_t` of

        S_t = diag(exp(log_decay_t))·S_{t-1} + k_t v_t^T                                      the decay family
        S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t))·S_{t-1} + beta_t k_t v_t^T        the delta family

    Which of them the inputs say: those of the delta family have beta. runs: (offset, length) each; heads: the number of
    states; causal: a token reads the state up to itself, else that of its whole document (only the decay family).
    Chains, and what `inside` and `grad_outputs` return, are the implementation's own.
    """

    kind: ClassVar[Any] = Inputs
    """The NamedTuple of its inputs."""

    runs: tuple[tuple[int, int], ...]
    heads: int
    scale: float
    causal: bool
    chunk_size: int

    # Forward ----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def states(self, inputs: Inputs) -> Chain:
        """States, each run from an empty memory."""

    @abstractmethod
    def inside(self, inputs: Inputs, chain: Any) -> Any:
        """What can be computed of the output before the state that enters each run is known."""

    @abstractmethod
    def read_out(self, inputs: Inputs, entered: Any, inside: Any) -> Tensor:
        """The whole output, in v's dtype."""

    @abstractmethod
    def forward(self, inputs: Inputs, incoming: list[Tensor | None]) -> tuple[Tensor, Chain]:
        """The output and the true states at once, where the state entering each run is known."""

    @abstractmethod
    def restore(self, inputs: Inputs, tensors: tuple[Tensor, ...]) -> Chain:
        """A chain of true states from its tensors."""

    # Backward ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def adjoint(self, inputs: Inputs, grad: Tensor, entered: Any) -> Chain:
        """Gradients of the states, in reverse: each run with nothing after it."""

    @abstractmethod
    def grad_outputs(self, inputs: Inputs, grad: Tensor, entered: Any) -> Any:
        """The gradients as far as they do not depend on later tokens' gradients."""

    @abstractmethod
    def grad_states(self, inputs: Inputs, entered: Any, adjoint: Any, found: Any) -> Gradients:
        """All gradients, each in its input's shape and dtype. found: what `grad_outputs` returned."""

    @abstractmethod
    def backward(
        self, inputs: Inputs, grad: Tensor, entered: Any, incoming: list[Tensor | None]
    ) -> tuple[Gradients, list[Tensor]]:
        """All gradients, and that of the state entering each run, where the gradient entering its end is known."""

    def operations(self, inputs: Inputs) -> int:
        """How many floating-point operations its mathematics takes: a token writes into a state and reads it, and in
        the delta family also what its key holds."""
        batch, tokens, _, key_dim = inputs.q.shape
        each = 4 if inputs.beta is None else 6
        return each * batch * tokens * self.heads * key_dim * inputs.v.shape[3]

    # What ranks know of one another -----------------------------------------------------------------------------------

    def transfer_rule(self, inputs: Inputs) -> Callable[[int], Tensor] | None:
        """A link's transfer from its number of tokens; None where it depends on them: gates that differ, keys that
        erase."""
        log_decay, dtype = inputs.log_decay, compute_dtype(inputs.q)
        if inputs.beta is not None:
            return None
        if log_decay is None:
            one = torch.ones(1, 1, 1, 1, dtype=dtype, device=inputs.q.device)
            return lambda length: one
        if log_decay.dim() > 1:
            return None
        per_head = finite(log_decay.to(dtype)).repeat_interleave(self.heads // log_decay.shape[0]).view(1, -1, 1, 1)
        return lambda length: decay_factor(per_head * length)
