"""The selective scan of Mamba (arXiv:2312.00752): decays per channel and state, never written down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lasp.kernels.precision import compute_dtype
from lasp.kernels.recomputed import Recomputed

CHUNK_SIZE = 16
"""Tokens whose states [I, N] are in memory at the same time, some of them several times; of others every 16th is."""


class Selected(NamedTuple):
    """u, step [B, T, I]; key (B), query (C) [B, T, N]; rates (A) [I, N]."""

    u: Tensor
    step: Tensor
    key: Tensor
    query: Tensor
    rates: Tensor


@dataclass(frozen=True)
class SelectiveScan(Recomputed):
    """`S_t = exp(step_t·A)·S_{t-1} + step_t·u_t·B_t`, `y_t = S_t·C_t` in every channel: states [B, I, N, 1]."""

    kind: ClassVar[Any] = Selected
    fixed: ClassVar[frozenset[str]] = frozenset({"rates"})

    def chunk(self, inputs: Selected, state: Tensor) -> tuple[Tensor, Tensor]:
        u, step, key, query = (x.transpose(0, 1) for x in inputs[:4])  # [C, B, ...]
        decay = (step.unsqueeze(-1) * inputs.rates).exp()
        written = (step * u).unsqueeze(-1) * key.unsqueeze(2)
        states = running(decay, written, state.squeeze(-1))
        output = (states @ query.unsqueeze(-1)).transpose(0, 1)
        return output, states[-1].unsqueeze(-1)

    def transfer(self, inputs: Selected) -> Tensor:
        return (inputs.step.sum(1).unsqueeze(-1) * inputs.rates).exp().unsqueeze(-1)

    def operations(self, inputs: Any) -> int:
        return 4 * inputs.u.numel() * inputs.rates.shape[1]

    def empty(self, inputs: Selected) -> Tensor:
        u, rates = inputs.u, inputs.rates
        return u.new_zeros(u.shape[0], *rates.shape, 1, dtype=compute_dtype(u))

    def new_output(self, inputs: Selected) -> Tensor:
        return inputs.u.new_empty(*inputs.u.shape, 1)


def running(decay: Tensor, written: Tensor, start: Tensor) -> Tensor:
    """`h_t = decay_t·h_{t-1} + written_t` of [C, ...], behind start [...]."""
    states: Tensor = _Running.apply(decay, written, start)
    return states


class _Running(torch.autograd.Function):
    """decay, written [C, ...], start [...] -> states [C, ...]; real. No exchange in either direction."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, written: Tensor, start: Tensor) -> Tensor:
        states, before = torch.empty_like(written), start
        for state, factor, own in zip(states, decay, written, strict=True):
            before = torch.addcmul(own, factor, before, out=state)
        ctx.save_for_backward(decay, states, start)
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, states, start = ctx.saved_tensors
        total = torch.empty_like(grad)
        later, last = torch.zeros_like(start), len(grad) - 1
        for t in range(last, -1, -1):
            later = (
                torch.add(grad[t], later, out=total[t])
                if t == last
                else torch.addcmul(grad[t], decay[t + 1], later, out=total[t])
            )
        before = torch.cat([start.unsqueeze(0), states[:-1]])
        return total * before, total, decay[0] * total[0]
