"""Stretch: neighbouring blocks of one size, and what they share: made once, and seen block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from lasp.kernels.chunks import Block
from lasp.kernels.decays import finite
from lasp.kernels.inputs import Inputs
from lasp.kernels.portable.gates import Gates
from lasp.kernels.portable.passing import Passing
from lasp.kernels.precision import compute_dtype


class Stretch:
    """Neighbouring blocks of one size. heads: of states; scale: of the queries."""

    def __init__(self, inputs: Inputs, blocks: Sequence[Block], heads: int, scale: float) -> None:
        self._first = min(blocks, key=lambda block: block.start)
        self._whole = replace(self._first, chunks=sum(block.chunks for block in blocks))
        self._views: dict[tuple[int, int], tuple[Tensor, tuple[Tensor, ...]]] = {}
        self.gates = self._gates(inputs, heads, scale)

    def index(self, block: Block) -> int:
        """Which of the blocks it is, in order of time."""
        return (block.start - self._first.start) // (self._first.stop - self._first.start)

    def views(self, x: Tensor, states: int) -> tuple[Tensor, ...]:
        """Each block's part of [B, T, h, D] or [B, T, h], as `block_view` lays it out."""
        if (id(x), states) not in self._views:
            parts = block_view(x if x.dim() == 4 else x.unsqueeze(-1), self._whole, states).split(self._first.chunks)
            self._views[id(x), states] = x, parts  # x is held: another tensor could get its id
        return self._views[id(x), states][1]

    @cached_property
    def passing(self) -> Passing:
        """What the blocks find for the gradient of the gates."""
        assert self.gates is not None, "only where there are gates"
        return Passing(self.gates)

    def put_gates(self, total: Tensor, before: Tensor | None = None) -> None:
        """Put the gradient of the gates into the blocks of [B, T, h, 1 or K], added to those of `before` if given."""
        target = block_view(total, self._whole, total.shape[2])
        found = as_view(self.passing.gradient(), target)
        if before is None:
            target.copy_(found)
        else:
            torch.add(block_view(before, self._whole, before.shape[2]), found, out=target)

    def _gates(self, inputs: Inputs, heads: int, scale: float) -> Gates | None:
        log_decay, dtype, chunks = inputs.log_decay, compute_dtype(inputs.q), (self._whole.chunks, self._first.chunks)
        if log_decay is None:
            return None
        if log_decay.dim() == 1:
            per_head = finite(log_decay.to(dtype)).repeat_interleave(heads // log_decay.shape[0])
            decays = per_head.view(1, 1, -1, 1, 1).expand(-1, -1, -1, self._whole.length, -1)
        else:
            view = block_view(log_decay.unsqueeze(-1) if log_decay.dim() == 3 else log_decay, self._whole, heads)
            decays = finite(view.to(dtype).flatten(2, 3))
        return Gates(decays, chunks, inputs.q.shape[0], scale)


def block_view(x: Tensor, block: Block, states: int) -> Tensor:
    """A block of [B, T, h, D] as [n, B, a, b, C, D]: a·b heads, or states when fewer heads than states are given."""
    batch, _, heads, dim = x.shape
    over_batch, over_tokens, over_heads, over_dim = x.stride()
    shared = heads // states if heads > states else 1  # heads that share a state
    size = (block.chunks, batch, heads // shared, shared if shared > 1 else states // heads, block.length, dim)
    inner = over_heads if shared > 1 else 0
    stride = (block.length * over_tokens, over_batch, shared * over_heads, inner, over_tokens, over_dim)
    return x.as_strided(size, stride, x.storage_offset() + block.start * over_tokens)


def as_view(tile: Tensor, view: Tensor) -> Tensor:
    """A tile [N, R, D] in the shape of a `block_view` of [B, T, h, D], summed over the states that share one of the h
    heads."""
    if tile.numel() == view.numel():
        return tile.reshape(view.shape)
    chunks, batch, heads, _, length, dim = view.shape
    return tile.reshape(chunks, batch, heads, -1, length, dim).sum(3, keepdim=True)
