"""What surrounds the tokens of one call of a mixer."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lasp.layers.state import State
from lasp.parallel.call import Arguments, Turn, begin_call


@dataclass(frozen=True)
class Context:
    """Arguments of `Mixer.forward` on their way to `lasp.functional`.

    sequence: the keywords that tell its functions how the sequence lies, "cut" or "group" and "cu_seqlens".
    lower_bound: of a layer's gates, where its model knows it.
    """

    attention_mask: Tensor | None
    state: State | None
    output_final_state: bool
    sequence: dict[str, Any]
    lower_bound: Tensor | None = None

    @property
    def ranks(self) -> int:
        """How many hold a part of the sequence."""
        cut, group = self.sequence.get("cut"), self.sequence.get("group")
        return cut.size if cut is not None else 1 if group is None else group.size

    @property
    def packed(self) -> bool:
        """Whether the sequence has documents."""
        cut = self.sequence.get("cut")
        return cut.packed if cut is not None else self.sequence.get("cu_seqlens") is not None

    def turn(self, operation: str, x: Tensor) -> Turn:
        """One call over the ranks about tokens x [B, T, ...], beside those of `lasp.functional`."""
        group, cut = self.sequence.get("group"), self.sequence.get("cut")
        return begin_call(group, operation, lambda: Arguments({"shape": [x.shape[0], *x.shape[2:]]}, x.shape[1]), cut)

    def positions(self, x: Tensor) -> Tensor | None:
        """Of the tokens of x [B, T, ...], counted from 0 in their documents, [1, T]; None where a rank cannot tell."""
        cut, cu_seqlens = self.sequence.get("cut"), self.sequence.get("cu_seqlens")
        if cut is None and self.ranks > 1:
            return None
        if cut is not None:
            return cut.positions(x.device).unsqueeze(0)
        positions = torch.arange(x.shape[1], device=x.device)
        if cu_seqlens is not None:
            ends = torch.as_tensor(cu_seqlens).to(positions)
            positions = positions - ends[torch.searchsorted(ends, positions, right=True) - 1]
        return positions.unsqueeze(0)


def sequence_of(**given: Any) -> dict[str, Any]:
    """Keywords without those that are None. Raises ValueError for a cut beside what it stands for."""
    sequence = {name: x for name, x in given.items() if x is not None}
    if "cut" in sequence and len(sequence) > 1:
        raise ValueError(
            f"a cut stands for group and cu_seqlens: give it alone, not with {', '.join(sorted(sequence))}"
        )
    return sequence
