"""The scalar memory of sLSTM (xLSTM, arXiv:2405.04517), whose gates read what the cell put out last: no scan can hold
it, for a stretch of tokens is no map that could be put together ahead of the state that enters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lasp.kernels.precision import compute_dtype
from lasp.kernels.recomputed import Recomputed

CHUNK_SIZE = 32
"""Tokens between states that are kept."""


class Gated(NamedTuple):
    """gates [B, T, 4, H, D], of x: cell input, input, forget and output; recurrent [4, H, D, D], of the last output."""

    gates: Tensor
    recurrent: Tensor


@dataclass(frozen=True)
class ScalarMemory(Recomputed):
    """`c_t = f c_{t-1} + i z`, `n_t = f n_{t-1} + i`, `h_t = o c_t / n_t`: states [B, H, D, 4] of h, c, n and m.

    c and n are kept divided by exp(m), the largest factor that either has had; m has no gradient, since h does not
    depend on it.
    """

    kind: ClassVar[Any] = Gated
    fixed: ClassVar[frozenset[str]] = frozenset({"recurrent"})

    def chunk(self, inputs: Gated, state: Tensor) -> tuple[Tensor, Tensor]:
        h, c, n, m = state.unbind(-1)
        outputs = []
        for gates in inputs.gates.unbind(1):
            z, i, f, o = (gates + torch.einsum("bhd,ghde->bghe", h, inputs.recurrent)).unbind(1)
            f = logsigmoid(f)
            before = m.detach().masked_fill(n == 0, -torch.inf)  # the first token has nothing to outweigh
            m = torch.maximum(f + before, i).detach()
            kept, entered = (f + before - m).exp(), (i - m).exp()
            c, n = kept * c + entered * z.tanh(), kept * n + entered
            h = o.sigmoid() * c / n
            outputs.append(h)
        return torch.stack(outputs, 1), torch.stack([h, c, n, m], -1)

    def transfer(self, inputs: Gated) -> Tensor:
        raise NotImplementedError("what an sLSTM does to a state is no linear map")

    def operations(self, inputs: Any) -> int:
        return 2 * inputs.gates.numel() * inputs.recurrent.shape[-1]

    def empty(self, inputs: Gated) -> Tensor:
        gates = inputs.gates
        return gates.new_zeros(gates.shape[0], *gates.shape[3:], 4, dtype=compute_dtype(gates))

    def new_output(self, inputs: Gated) -> Tensor:
        gates = inputs.gates
        return gates.new_empty(*gates.shape[:2], *gates.shape[3:])
