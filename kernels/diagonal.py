"""Diagonal complex state spaces with constant rates (S4D, arXiv:2206.11893), seen both ways.

Inside a chunk they are a convolution, by fast Fourier transforms; from chunk to chunk, and from rank to rank, a
recurrence of complex states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lasp.kernels.decays import finite
from lasp.kernels.precision import compute_dtype
from lasp.kernels.recomputed import Recomputed

CHUNK_SIZE = 128
"""Tokens that are convolved at once, with the powers [C, I, N] of all rates in memory."""


class Driven(NamedTuple):
    """u [B, T, I]; rates, weights [I, N], complex: of each state its exponent per token, and what it adds to y."""

    u: Tensor
    rates: Tensor
    weights: Tensor


@dataclass(frozen=True)
class DiagonalStateSpace(Recomputed):
    """`S_t = exp(rates)·S_{t-1} + u_t`, `y_t = 2·Re sum_n weights_n·S_t` in every channel: states [B, I, N, 1]."""

    kind: ClassVar[Any] = Driven
    fixed: ClassVar[frozenset[str]] = frozenset({"rates", "weights"})

    def chunk(self, inputs: Driven, state: Tensor) -> tuple[Tensor, Tensor]:
        u, rates, weights = inputs
        length = u.shape[1]
        powers = _powers(rates, length)  # [C + 1, I, N]
        kernel = 2 * (weights * powers[:-1]).sum(-1).real  # [C, I]
        spectrum = torch.fft.rfft(u, 2 * length, dim=1) * torch.fft.rfft(kernel, 2 * length, dim=0)
        inside = torch.fft.irfft(spectrum, 2 * length, dim=1)[:, :length]
        entered = 2 * torch.einsum("bin,cin->bci", state.squeeze(-1), weights * powers[1:]).real
        after = powers[-1] * state.squeeze(-1) + torch.einsum("bci,cin->bin", u.to(powers.dtype), powers[:-1].flip(0))
        return (inside + entered).unsqueeze(-1), after.unsqueeze(-1)

    def transfer(self, inputs: Driven) -> Tensor:
        return _decayed(inputs.rates, inputs.u.shape[1])

    def transfer_rule(self, inputs: Any) -> Callable[[int], Tensor]:
        rates = inputs.rates.detach()
        return lambda length: _decayed(rates, length)

    def operations(self, inputs: Any) -> int:
        return 16 * inputs.u.numel() * inputs.rates.shape[1]  # 4 products of complex numbers to each of a real one

    def empty(self, inputs: Driven) -> Tensor:
        u, rates = inputs.u, inputs.rates
        dtype = torch.complex128 if compute_dtype(u) == torch.float64 else torch.complex64
        return u.new_zeros(u.shape[0], *rates.shape, 1, dtype=dtype)

    def new_output(self, inputs: Driven) -> Tensor:
        return inputs.u.new_empty(*inputs.u.shape, 1)


def _exponents(rates: Tensor) -> Tensor:
    """In fp64, for phases of many turns; and finite, for 0 tokens of what forgets at once."""
    return torch.complex(finite(rates.real.double()), rates.imag.double())


def _powers(rates: Tensor, length: int) -> Tensor:
    """exp(rates·t) for t = 0 .. length."""
    steps = torch.arange(length + 1, device=rates.device).view(-1, 1, 1)
    return (_exponents(rates) * steps).exp().to(rates.dtype)


def _decayed(rates: Tensor, length: int) -> Tensor:
    """exp(rates·length) as a transfer [1, I, N, 1]."""
    return (_exponents(rates) * length).exp().to(rates.dtype).unsqueeze(-1).unsqueeze(0)
