"""Whether a tensor has values, and they may be read."""

from __future__ import annotations

import torch
from torch import Tensor


def may_look_at(x: Tensor) -> bool:
    """Whether values can be checked: an accelerator would be waited for, and fake tensors and torch.compile's have
    none."""
    return not torch.compiler.is_compiling() and x.untyped_storage().device.type == "cpu"
