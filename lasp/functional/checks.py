"""Checks that more than one operation makes: a mistake is a ValueError with the offending values."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from lasp.kernels.arguments import check_tensors
from lasp.kernels.documents import document_bounds
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup


def check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_tensors(q=q, k=k, v=v)
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if any(x.dim() != 4 for x in (q, k, v)):
        raise ValueError(f"q, k, v must be [batch, tokens, heads, dim], got {shapes}")
    if not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        raise ValueError(f"q, k, v must share batch and tokens, got {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must share their last dim, got {shapes}")
    if min(*q.shape[2:], *v.shape[2:], k.shape[2], q.shape[0]) < 1:
        raise ValueError(f"batch, heads and dims must be at least 1, got {shapes}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v must share a floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must share a device, got {q.device}, {k.device}, {v.device}")


def check_documents(
    q: Tensor, cu_seqlens: Tensor | Sequence[int] | None, cut: Cut | None = None
) -> tuple[int, ...] | None:
    """The bounds of packed documents; whether they end where the sequence does is known when the ranks have agreed."""
    if cut is not None and cu_seqlens is not None:
        raise ValueError("give cut or cu_seqlens, not both: a cut has its documents")
    given = None if cu_seqlens is None else document_bounds(cu_seqlens)
    bounds = given if cut is None else cut.bounds
    if bounds is not None and q.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs documents into one sequence and needs B = 1, got B = {q.shape[0]}")
    return bounds


def ranks_of(group: SequenceGroup | None, cut: Cut | None) -> int:
    """Over how many the sequence of a call is cut."""
    return cut.size if cut is not None else 1 if group is None else group.size


def is_packed(cu_seqlens: Tensor | Sequence[int] | None, cut: Cut | None) -> bool:
    """Whether a call has packed documents, and one initial state for each of them."""
    return cu_seqlens is not None if cut is None else cut.packed


def check_heads(heads: dict[str, int]) -> None:
    counts = sorted(set(heads.values()))
    for fewer, more in pairwise(counts):
        if more % fewer:
            raise ValueError(f"numbers of heads must divide one another, got {heads}")


def check_beside(name: str, x: Tensor, q: Tensor, what: str = "q") -> None:
    """Check a tensor that goes with q, or with `what` q is."""
    check_tensors(**{name: x})
    if not x.is_floating_point() or x.device != q.device:
        raise ValueError(
            f"{name} must be floating and on the device of {what}, {q.device}, got {x.dtype} on {x.device}"
        )
