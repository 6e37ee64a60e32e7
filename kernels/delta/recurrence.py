"""The delta family set up for one call."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lasp.kernels.decay.chunked import Gradients
from lasp.kernels.decay.recurrence import DecayCall, DecayRecurrence, Grads
from lasp.kernels.decay.stages import stage_operators
from lasp.kernels.decay.tiles import Inputs
from lasp.kernels.delta.chunked import DeltaStages


class DeltaCall(DecayCall):
    """`S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t))·S_{t-1} + beta_t k_t v_t^T`, `o_t = scale·S_t^T q_t`.

    Fields as for `DecayCall`; inputs are q, k, v, log_decay and beta. Only causal.
    """

    def transfer_rule(self, inputs: Inputs) -> Callable[[int], Tensor] | None:
        """None: what a link erases depends on its keys."""
        return None

    def like_inputs(self, total: Gradients, inputs: Inputs) -> Grads:
        v, beta = inputs[2], inputs[4]
        assert total.beta is not None, "the stages of the delta family make one"
        dv = total.v if total.v.shape[2] == v.shape[2] else total.v.unflatten(2, (v.shape[2], -1)).sum(3)
        dbeta = total.beta.view(beta.shape).to(beta.dtype)
        return *super().like_inputs(total._replace(v=dv), inputs), dbeta


class DeltaRecurrence(DeltaCall, DecayRecurrence):
    """A call by the stages of `chunked.py`, in plain PyTorch."""

    operators = stage_operators("delta", DeltaStages())
