"""Integers only: the checks of `cu_seqlens`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from lasp.kernels.arguments import told


def document_bounds(cu_seqlens: Tensor | Sequence[int], length: int | None = None) -> tuple[int, ...]:
    """Check that `cu_seqlens` [N + 1] rises from 0 to `length`, where that is known, and return it as integers.

    Raises ValueError with the offending values. Equal neighbours are allowed: they bound an empty document.
    """
    values = _integers(cu_seqlens)
    if len(values) < 2 or values[0] != 0:
        raise ValueError(f"cu_seqlens must begin with 0 and name at least one document, got {_shorten(values)}")
    falls = [(a, b) for a, b in pairwise(values) if b < a]
    if falls:
        raise ValueError(f"cu_seqlens must never decrease, got {falls[0][0]} followed by {falls[0][1]}")
    if length is not None and values[-1] != length:
        raise ValueError(f"cu_seqlens must end at the whole sequence's length {length}, got {values[-1]}")
    return tuple(values)


def _integers(cu_seqlens: object) -> list[int]:
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.is_meta:
        raise ValueError(f"cu_seqlens must hold numbers, got {told(cu_seqlens)}")
    if isinstance(cu_seqlens, list | tuple | range):
        values: object = list(cu_seqlens)
    else:  # of tensors and NumPy's arrays
        values = getattr(cu_seqlens, "tolist", lambda: None)()
    if not isinstance(values, list) or any(not isinstance(value, int) or isinstance(value, bool) for value in values):
        raise ValueError(f"cu_seqlens must be a 1-D sequence of integers, got {told(cu_seqlens)}")
    return values


def _shorten(values: Sequence[int]) -> str:
    return str(list(values)) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"
