"""The chains of both families on a GPU, and what a call's inputs become before the first of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lasp.kernels.chain import Pass, SegmentChain
from lasp.kernels.chunks import ceil_div
from lasp.kernels.gpu import operators
from lasp.kernels.gpu.operators import Setting
from lasp.kernels.gpu.table import DeviceTable, device_table
from lasp.kernels.inputs import Inputs
from lasp.kernels.recurrence import Recurrence

# Without a mask nothing is computed inside a chunk, whose length is then that of a tile.
LONGEST_CHUNK = 64


class Solved(NamedTuple):
    """Of the delta family: each chunk's triangular system inverted [B, T, H, C], U [B, T, H, V] and W [B, T, H, K]."""

    inverse: Tensor
    written: Tensor
    erased: Tensor


class Arranged:
    """The inputs of a call as the kernels take them. solved: None for the decay family."""

    def __init__(self, inputs: Inputs, recurrence: Recurrence, at_once: int) -> None:
        self.q, self.k, self.v = (x.contiguous() for x in inputs[:3])
        heads, size = recurrence.heads, min(recurrence.chunk_size, LONGEST_CHUNK)
        programs = self.q.shape[0] * heads * ceil_div(self.q.shape[3], 64) * ceil_div(self.v.shape[3], 64)
        device = self.q.device
        self.table: DeviceTable = device_table(recurrence.runs, size, recurrence.causal, programs, at_once, device)
        self.setting = Setting(
            None if inputs.log_decay is None else self._sums(inputs.log_decay, size),
            self.table.chunks,
            self.table.segments,
            heads,
            recurrence.scale,
            size,
            causal=recurrence.causal,
            strict=False,
            trained=inputs.trained,
        )
        self.beta = None if inputs.beta is None else inputs.beta.contiguous()
        solve = operators.solve
        self.solved = None if self.beta is None else Solved(*solve(self.k, self.v, self.beta, self.setting))

    @property
    def erased(self) -> Tensor | None:
        """W of the delta family."""
        return None if self.solved is None else self.solved.erased

    def segment_decays(self) -> Tensor:
        """The decay over each segment, [segments, B, H, 1 or K, 1]."""
        sums, heads = self.setting.sums, self.setting.heads
        count, batch = len(self.table.segments), self.q.shape[0]
        if sums is None:
            return torch.ones(count, batch, heads, 1, 1, device=self.q.device)
        first, length, _ = self.table.chunks.long().unbind(1)
        whole = sums[:, first + length - 1].movedim(1, 0)
        total = whole.new_zeros(count, *whole.shape[1:]).index_add_(0, self.table.owner, whole)
        return total.exp().repeat_interleave(heads // total.shape[2], 2).unsqueeze(-1)

    def _sums(self, gates: Tensor, size: int) -> Tensor:
        """The running sums of log-decays within chunks, [B, T, HG, 1 or K]."""
        gates = gates.expand(*self.q.shape[:2], -1) if gates.dim() == 1 else gates
        gates = gates.unsqueeze(-1) if gates.dim() == 3 else gates
        sums: Tensor = operators.sum_gates(gates.contiguous(), self.table.chunks, size)
        return sums


class States(SegmentChain):
    """The states of a call."""

    def __init__(self, own: Arranged) -> None:
        super().__init__(own.table.runs)
        self.own = own

    @property
    def values(self) -> Tensor:
        """What the tokens write: values [B, T, HV, V], or in the delta family what it is once states have entered."""
        return self.own.v if self.own.solved is None else self.written

    def carry(self, starts: Tensor | None, store: bool) -> Pass:
        own = self.own
        values = own.v if own.solved is None else own.solved.written
        done: Pass = operators.carry(own.k, values, own.erased, starts, own.setting, values.shape[3], store, False)
        return done

    def make_transfers(self) -> Tensor:
        """Of a delta rule, the same recurrence without values, from the identity, and without short operands."""
        own, dim = self.own, self.own.k.shape[3]
        if own.solved is None:
            return own.segment_decays()
        eye = torch.eye(dim, device=own.k.device)
        starts = eye.expand(len(own.table.segments), own.k.shape[0], own.setting.heads, -1, -1).contiguous()
        transfers: Tensor = operators.carry(own.k, None, own.erased, starts, own.setting, dim, False, True)[2]
        return transfers


class Adjoint(SegmentChain):
    """Their gradients. grad: of the output."""

    reverse = True

    def __init__(self, forwards: States, grad: Tensor) -> None:
        super().__init__(forwards.own.table.runs)
        self.forwards, self.own, self.grad = forwards, forwards.own, grad.contiguous()
        own, dtype = self.own, torch.float32
        # Of the delta family, the gradient of what the tokens write, as far as it comes from their chunk.
        self._grad_inside: Tensor | None = (
            None
            if own.solved is None
            else operators.grad_values(own.q, own.k, self.grad, None, own.setting, True, dtype)
        )

    def carry(self, starts: Tensor | None, store: bool) -> Pass:
        own = self.own
        done: Pass = operators.carry_back(
            own.q, own.k, self.grad, own.erased, self._grad_inside, starts, own.setting, store
        )
        return done

    def make_transfers(self) -> Tensor:
        return self.forwards.transfers
