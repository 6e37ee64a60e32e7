"""Short causal convolution of channels, on one device, told what came before each run of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv1d


def causal_convolution(
    x: Tensor, before: Sequence[Tensor], lengths: Sequence[int], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """`y_t = sum_i weight[:, i]·x_{t-W+1+i} + bias` in every run, of nothing but the run and what came before it.

    x [B, T, D], runs of `lengths` tokens one after the other; before: of each run the W - 1 tokens ahead of its first,
    [B, W - 1, D]; weight [D, W], bias [D]. Returns the output [B, T, D], and of each run the W - 1 tokens ahead of what
    would follow it. Differentiable by autograd.
    """
    halo = weight.shape[1] - 1
    # One convolution for all runs: each stands behind its own past, so none reads another's tokens.
    stretch = torch.cat([part for pair in zip(before, x.split(list(lengths), 1), strict=True) for part in pair], 1)
    ends = [run[:, run.shape[1] - halo :] for run in stretch.split([halo + length for length in lengths], 1)]
    if not x.shape[1]:  # conv1d wants tokens; everything gets a gradient of 0, not none at all
        nothing = stretch[:, :0] * weight.sum(1)
        return nothing if bias is None else nothing + bias, ends
    output = conv1d(stretch.mT, weight.unsqueeze(1), bias, groups=weight.shape[0]).mT
    if len(lengths) == 1:
        return output.contiguous(), ends
    # What a run's past yields by itself is dropped.
    parts = output.split([size for length in lengths for size in (length, halo)][:-1], 1)
    return torch.cat(parts[::2], 1), ends
