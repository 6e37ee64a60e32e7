"""The delta rule with a key that reads and one that erases: transfers of a diagonal plus rank one (RWKV-7, DPLR)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lasp.kernels.decays import finite
from lasp.kernels.precision import compute_dtype
from lasp.kernels.recomputed import Recomputed

CHUNK_SIZE = 32
"""Tokens whose pairwise decays [C, C, K] are in memory at the same time."""


class Corrected(NamedTuple):
    """q [B, T, Hq, K]; k, log_decay, read, erase [B, T, H, K]; v [B, T, H, V]."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    read: Tensor
    erase: Tensor


@dataclass(frozen=True)
class DiagonalPlusRankOne(Recomputed):
    """`S_t = diag(exp(log_decay_t))·S_{t-1} - erase_t·(read_t^T S_{t-1}) + k_t v_t^T`, `o_t = scale·S_t^T q_t`.

    In a chunk, with decays D from token to token, the rows `u_t = read_t^T S_{t-1}` of what tokens find solve a
    triangular system: what is found now lacks what was erased before (the WY form of arXiv:2406.06484, for two keys).
    """

    kind: ClassVar[Any] = Corrected

    def chunk(self, inputs: Corrected, state: Tensor) -> tuple[Tensor, Tensor]:
        gates, between = _decays(inputs)
        q, k, v, _, read, erase = (x.transpose(1, 2) for x in inputs)  # [B, H, C, ...]
        keys, erased = (between * x.unsqueeze(2) for x in (k, erase))  # of s, as t finds them: [B, H, t, s, K]
        held, system = _found(read, gates, erased)
        ahead = _before(read, keys).tril(-1)
        found = torch.linalg.solve_triangular(system, held @ state + ahead @ v, upper=False, unitriangular=True)
        # The queries that share a state, below one another for each token.
        queries = q.unflatten(1, (k.shape[1], -1)).transpose(2, 3)
        output = (queries * gates.exp().unsqueeze(3)) @ state.unsqueeze(2)
        output = output + (queries @ keys.mT) @ v.unsqueeze(2) - (queries @ erased.mT) @ found.unsqueeze(2)
        left = (gates[:, :, -1:] - gates).exp()
        after = gates[:, :, -1].exp().unsqueeze(-1) * state + (k * left).mT @ v - (erase * left).mT @ found
        return self.scale * output.transpose(2, 3).flatten(1, 2).transpose(1, 2), after

    def transfer(self, inputs: Corrected) -> Tensor:
        whole = torch.diag_embed(finite(inputs.log_decay).sum(1).exp())
        if not inputs.k.shape[1]:
            return whole
        gates, between = _decays(inputs)
        read, erase = (x.transpose(1, 2) for x in (inputs.read, inputs.erase))
        held, system = _found(read, gates, between * erase.unsqueeze(2))
        found = torch.linalg.solve_triangular(system, held, upper=False, unitriangular=True)
        return whole - (erase * (gates[:, :, -1:] - gates).exp()).mT @ found

    def operations(self, inputs: Any) -> int:
        return 6 * inputs.v.numel() * inputs.k.shape[3]

    def empty(self, inputs: Corrected) -> Tensor:
        k, v = inputs.k, inputs.v
        return k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=compute_dtype(k))

    def new_output(self, inputs: Corrected) -> Tensor:
        return inputs.v.new_empty(*inputs.q.shape[:3], inputs.v.shape[3])


def _decays(inputs: Corrected) -> tuple[Tensor, Tensor]:
    """Sums of log-decays up to each token [B, H, C, K], and decays from s to t, 0 where s is later: [B, H, t, s, K]."""
    gates = finite(inputs.log_decay).transpose(1, 2).cumsum(2)
    later = torch.ones(gates.shape[2], gates.shape[2], dtype=torch.bool, device=gates.device).triu(1)
    apart = gates.unsqueeze(3) - gates.unsqueeze(2)
    return gates, apart.masked_fill(later.unsqueeze(-1), -torch.inf).exp()


def _before(read: Tensor, keys: Tensor) -> Tensor:
    """What each token reads of the keys of others, as they have decayed by the token before it: [B, H, t, s]."""
    scores = (read[:, :, 1:].unsqueeze(3) @ keys[:, :, :-1].mT).squeeze(3)
    return torch.nn.functional.pad(scores, (0, 0, 1, 0))


def _found(read: Tensor, gates: Tensor, erased: Tensor) -> tuple[Tensor, Tensor]:
    """What reads the state ahead of the chunk [B, H, C, K], and the triangular system [B, H, C, C] of what is found."""
    before = torch.nn.functional.pad(gates[:, :, :-1], (0, 0, 1, 0))
    return read * before.exp(), _before(read, erased).tril(-1)
