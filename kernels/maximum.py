"""Running maximum of what decays, `m_t = max(m_{t-1} + f_t, x_t)`: the stabiliser of exponential gates.

-inf stands for nothing: before the first token, and of a token that adds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Highest:
    """The map `m -> max(m + decay, state)` of a stretch of tokens. state: what leaves it where nothing enters."""

    decay: Tensor
    state: Tensor

    def __call__(self, incoming: Tensor) -> Tensor:
        """m after the stretch, given the one before it."""
        return torch.maximum(incoming + self.decay, self.state)

    def then(self, later: Highest) -> Highest:
        """This stretch followed by `later`, as one stretch."""
        return Highest(self.decay + later.decay, later(self.state))

    @property
    def dim(self) -> int:
        """Of a state [..., heads, 1], the one along which it may be cut into blocks."""
        return -2

    def block(self, index: int, blocks: int) -> Highest:
        """What the map does to one of so many blocks of a state."""
        return Highest(*(x.tensor_split(blocks, self.dim)[index] for x in (self.decay, self.state)))


def running(x: Tensor, decay: Tensor, entering: Tensor) -> Tensor:
    """m_0 .. m_T [B, T + 1, H] of x and decays [B, T, H] behind m_0 = entering [B, H].

    By doubling: a sum of decays that is taken off again leaves nothing of x behind a gate that is closed.
    """
    highest, decay = torch.cat([entering.unsqueeze(1), x], 1), torch.nn.functional.pad(decay, (0, 0, 1, 0))
    reach = 1
    while reach < highest.shape[1]:
        later = torch.maximum(highest[:, reach:], highest[:, :-reach] + decay[:, reach:])
        highest = torch.cat([highest[:, :reach], later], 1)
        decay = torch.cat([decay[:, :reach], decay[:, reach:] + decay[:, :-reach]], 1)
        reach *= 2
    return highest
