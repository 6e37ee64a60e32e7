"""Passing: what passes the gates of a stretch, summed block by block: the gradient of its log-decays.

A gate decays all that goes over it, so its gradient is the sum of value times gradient of all that does. Those sums are
never differences of two sums that share a part.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lasp.kernels.portable.gates import Gates


class Passing:
    """Sums of each block of a stretch, to be added to, in order of time.

    from_start: of tokens [N, C, 1 or K] that read the state that enters the chunk, over the gates up to their own;
    to_end: of tokens that are carried to the chunk's end, over the gates behind them; across: of states [N, 1, 1 or K]
    that are carried from its start to its end; within: of pairs of its tokens, by the gate that they pass.
    """

    def __init__(self, gates: Gates) -> None:
        (self._from_start, self.from_start), (self._to_end, self.to_end) = gates.new_sums(), gates.new_sums()
        self._gates = gates
        (self._across, self.across), (self._within, self.within) = gates.new_sums(tokens=1), gates.new_sums()

    def gradient(self) -> Tensor:
        """What passes each gate of all blocks, [N, C, 1 or K]."""
        later = self._from_start.flip(-2).cumsum(-2).flip(-2)
        earlier = F.pad(self._to_end.cumsum(-2), (0, 0, 1, -1))
        return later.add_(earlier).add_(self._across * self._gates.over_chunk).add_(self._within)
