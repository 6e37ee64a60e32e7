"""OPT: softmax attention, and positions that are counted by the attention_mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lasp.wrap.family import Family


def check_mask(keywords: Mapping[str, Any]) -> None:
    mask = keywords.get("attention_mask")
    if mask is not None and not mask.all():
        raise ValueError("OPT counts positions by its attention_mask: leave that out, with padding at the end only")


FAMILIES = (Family("opt", check_inputs=check_mask),)
