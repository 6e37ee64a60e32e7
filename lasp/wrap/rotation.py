"""RoPE whose frequencies depend on the longest position: an option of any family's configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lasp.wrap.swap import swap
from lasp.wrap.wiring import LayerCall


def swap_rotation(module: Any) -> None:
    """RoPE whose frequencies depend on the longest position sees that of the whole sequence."""
    kinds = getattr(module, "rope_type", None)
    if not {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
        return
    original = type(module).forward

    @torch.compiler.disable
    def run(self: nn.Module, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        cut = LayerCall.of(self, None).known_cut
        if cut.packed:
            raise ValueError(f"rope_type {kinds!r} depends on one length, and packed documents have several")
        last = position_ids.new_full((*position_ids.shape[:-1], 1), cut.total - 1)
        rotations = original(self, x, torch.cat([position_ids, last], -1), *args, **kwargs)
        return tuple(rotation[:, :-1] for rotation in rotations)

    swap(module, "forward", run)
