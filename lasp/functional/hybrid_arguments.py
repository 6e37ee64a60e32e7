"""What `hybrid_attention` is given and keeps: its options, its state, and what of them is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from lasp.functional.checks import check_beside, check_heads
from lasp.kernels.arguments import check_tensors, told
from lasp.kernels.backend import Backend
from lasp.kernels.values import check_values, may_look_at
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.scan import Scan, ScanName


class HybridState(NamedTuple):
    """What `hybrid_attention` keeps of the tokens so far: of fixed size. w: the window."""

    memory: Tensor  # [B, H, F, V + 1] in fp32 (fp64): of the tokens that have left the window; V + 1: the normaliser
    k: Tensor  # [B, w, Hk, K], of the last w tokens, as the two below
    v: Tensor  # [B, w, Hv, V]
    phi_k: Tensor  # [B, w, Hf, F]
    shown: Tensor  # [B, w] bool: False where there was no token, or a hidden one


class HybridOptions(TypedDict, total=False):
    """The keywords that do not change what is returned, for type checkers."""

    window_factor: Tensor | None
    relative: bool
    scale: float | None
    key_mask: Tensor | None
    initial_state: HybridState | None
    cu_seqlens: Tensor | Sequence[int] | None
    group: SequenceGroup | None
    cut: Cut | None
    scan: ScanName | Scan
    backend: Backend
    chunk_size: int | None


def check_hybrid(
    tokens: tuple[Tensor, Tensor, Tensor],
    features: tuple[Tensor, Tensor],
    factor: Tensor | None,
    key_mask: Tensor | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Returns what all ranks must share beside what the linear part's check returns."""
    q, k, v = tokens
    _check_features(features, q)
    heads = {"q": q, "k": k, "v": v, "phi_q": features[0], "phi_k": features[1]}
    counts = {name: x.shape[2] for name, x in heads.items()}
    check_heads(counts)
    _check_factor(factor, max(counts.values()), q)
    if key_mask is not None and (key_mask.shape != q.shape[:2] or key_mask.dtype != torch.bool):
        raise ValueError(f"key_mask must be bool {list(q.shape[:2])}, got {key_mask.dtype} {list(key_mask.shape)}")
    if key_mask is not None and key_mask.device != q.device:
        raise ValueError(f"key_mask must be on the device of q, {q.device}, got {key_mask.device}")
    return {
        "window": options["window"],
        "relative": options["relative"],
        "scale of the scores": q.shape[3] ** -0.5 if options["scale"] is None else options["scale"],
        "all heads": counts,
        "key dim": q.shape[3],
        "dtypes": [str(x.dtype) for x in (v, features[1])],
        "window_factor": factor is not None,
        "key_mask": key_mask is not None,
    }


def _check_features(features: tuple[Tensor, Tensor], q: Tensor) -> None:
    """Raises ValueError for what are no features of the tokens of q."""
    for name, x in zip(("phi_q", "phi_k"), features, strict=True):
        check_beside(name, x, q)
        if x.dim() != 4 or x.shape[:2] != q.shape[:2] or min(x.shape[2:]) < 1:
            raise ValueError(
                f"{name} must be [B, T, heads, features] and share batch and tokens with q {list(q.shape)}, "
                f"got {list(x.shape)}"
            )
    if features[0].shape[3] != features[1].shape[3]:
        raise ValueError(
            f"phi_q and phi_k must share their last dim, got {list(features[0].shape)} and {list(features[1].shape)}"
        )


def _check_factor(factor: Tensor | None, heads: int, q: Tensor) -> None:
    check_tensors(("window_factor",), window_factor=factor)
    if factor is None:
        return
    check_beside("window_factor", factor, q)
    if list(factor.shape) != [heads]:
        raise ValueError(f"window_factor must be [H] = [{heads}], got {list(factor.shape)}")
    if may_look_at(factor):
        check_values(factor > 0, lambda: f"window_factor must be positive, got a minimum of {factor.min().item()}")


def check_state(
    tokens: tuple[Tensor, Tensor, Tensor],
    features: tuple[Tensor, Tensor],
    window: int,
    state: Any,
    final: bool,
    apart: bool,
) -> None:
    """apart: the sequence has documents, or other ranks hold a part of it."""
    if apart and (state is not None or final):
        raise ValueError("hybrid_attention keeps a state of one text on one device: not with cu_seqlens or over ranks")
    if state is None:
        return
    if not isinstance(state, HybridState):
        raise ValueError(f"initial_state must be a HybridState, got {told(state)}")
    _, k, v = tokens
    for name, x, like in (("k", state.k, k), ("v", state.v, v), ("phi_k", state.phi_k, features[1])):
        if list(x.shape) != [like.shape[0], window, *like.shape[2:]] or x.device != like.device:
            raise ValueError(
                f"initial_state.{name} must be {[like.shape[0], window, *like.shape[2:]]} on {like.device}, "
                f"got {list(x.shape)} on {x.device}"
            )
    if list(state.shown.shape) != [k.shape[0], window]:
        raise ValueError(f"initial_state.shown must be {[k.shape[0], window]}, got {list(state.shown.shape)}")
