"""Softmax attention, on one device or with the sequence cut over a group of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lasp.functional.checks import check_documents, check_heads, check_tokens
from lasp.kernels.arguments import check_flags, check_integer, check_number, check_tensors
from lasp.kernels.precision import compute_dtype
from lasp.kernels.softmax.blocks import BlockAttention
from lasp.kernels.softmax.mask import Mask
from lasp.parallel import methods, softmax
from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.untraced import untraced


@untraced
def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    group: SequenceGroup | None = None,
    cut: Cut | None = None,
    method: methods.Method = "auto",
) -> Tensor:
    """Softmax attention, `o_t = sum_i softmax(scale·q_t·k_i)_i v_i` over the keys that token t sees.

    q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V], of one dtype. Each may have its own number of heads if every
    count divides the next larger. Without a group T is the whole sequence; with one, q, k, v and key_mask are this
    rank's tokens, and everything else speaks of the whole sequence.

    scale: of the scores, K**-0.5 by default. causal: a token sees itself and what comes before it. window: it sees
    itself and the window - 1 tokens before it, causal only. softcap c: scores become `c·tanh(scores / c)` (Gemma 2).
    sinks [H], H the largest number of heads: one more score per head, of value 0 (gpt-oss). key_mask [B, T]: False
    hides a key. cu_seqlens: bounds of packed documents [documents + 1], for B = 1; no token sees another document's.
    cut: in the place of group and cu_seqlens, as in `linear_attention`.

    method: "ring" (Ring Attention, arXiv:2310.01889) needs no more memory on more ranks and skips what the mask
    empties; "gather" (LASP-2H, arXiv:2502.07563) is one message, and keeps all keys; "ulysses" (arXiv:2309.14509) deals
    out heads, whose number the ranks must divide; "ulysses_ring" (arXiv:2405.07719) does so over the neighbours of a
    group made with heads=h. "auto" is the one whose exchanges take least over the group's wires, of those that the
    heads allow: "gather" where the keys of all ranks have no more heads together than the queries of one; "ring" unless
    another saves a tenth. Causal work is even over ranks on the zigzag layout.

    Returns the output [B, T, H, V] in v's dtype; 0 where a token sees nothing. Differentiable in q, k, v and sinks,
    once. Raises ValueError, on every rank of the group, for arguments that do not fit.
    """
    options = {"causal": causal, "window": window, "method": method}
    ranks = getattr(cut, "group", None) or group

    def check() -> Arguments:
        check_flags(causal=causal)
        numbers = {"scale": check_number("scale", scale), "softcap": check_number("softcap", softcap)}
        check_tokens(q, k, v)
        check_tensors(("sinks", "key_mask"), sinks=sinks, key_mask=key_mask)
        bounds = check_documents(q, cu_seqlens, cut)
        fields = _check_softmax((q, k, v), sinks, key_mask, ranks, options | numbers)
        return Arguments(fields, q.shape[1], bounds)

    turn = begin_call(group, "softmax_attention", check, cut)
    lies = turn()
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if scale <= 0:  # flash kernels hide scores by -inf before they scale them
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    mask = Mask(lies.bounds or (0, lies.total), causal, window)
    attention = BlockAttention(mask, scale, None if softcap is None else float(softcap))
    heads, key_heads = _attention_heads(q, k, v)
    q, k, v = (_with_heads(x, count) for x, count in ((q, heads), (k, key_heads), (v, key_heads)))
    chosen = _chosen(q, k, v, lies, mask, key_mask is not None) if method == "auto" else method
    return softmax.shared_attention(softmax.Call(attention, lies, turn, chosen), q, k, v, sinks, key_mask)


def _chosen(q: Tensor, k: Tensor, v: Tensor, cut: Cut, mask: Mask, key_mask: bool) -> str:
    """The method that "auto" stands for, from what all ranks have agreed on."""
    dims = q.shape[3], v.shape[3], q.element_size(), compute_dtype(q).itemsize
    shapes = methods.Shapes(q.shape[0], q.shape[2], k.shape[2], *dims, key_mask)
    return cut.keep(("method", mask.causal, mask.window, shapes), lambda: methods.choose(cut, mask, shapes))


def _with_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, h, D] with each head repeated until there are `heads`."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def _attention_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int]:
    """Numbers of heads of queries, and of keys and values: those of few heads are shared."""
    return max(x.shape[2] for x in (q, k, v)), max(k.shape[2], v.shape[2])


# Checks -------------------------------------------------------------------------------------------------------------


def _check_softmax(
    tokens: tuple[Tensor, Tensor, Tensor],
    sinks: Tensor | None,
    key_mask: Tensor | None,
    group: SequenceGroup | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Returns what all ranks must share."""
    q, k, v = tokens
    heads = {"q": q.shape[2], "k": k.shape[2], "v": v.shape[2]}
    check_heads(heads)
    _check_window(options["window"], options["causal"])
    if options["softcap"] is not None and not options["softcap"] > 0:
        raise ValueError(f"softcap must be positive, got {options['softcap']}")
    query_heads, _ = _attention_heads(q, k, v)
    if sinks is not None and (list(sinks.shape) != [query_heads] or not sinks.is_floating_point()):
        raise ValueError(f"sinks must be floating [{query_heads}], got {sinks.dtype} {list(sinks.shape)}")
    if key_mask is not None and (key_mask.shape != q.shape[:2] or key_mask.dtype != torch.bool):
        raise ValueError(f"key_mask must be bool {list(q.shape[:2])}, got {key_mask.dtype} {list(key_mask.shape)}")
    for name, x in (("sinks", sinks), ("key_mask", key_mask)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    methods.check_method(options["method"], group, query_heads)
    tensors = [x for x in (q, k, v, sinks) if x is not None]
    return options | {
        "scale": q.shape[3] ** -0.5 if options["scale"] is None else options["scale"],
        "device": q.device.type,
        "batch": q.shape[0],
        "heads": heads,
        "dims": [q.shape[3], v.shape[3]],
        "dtype": str(q.dtype),
        "sinks": sinks is not None,
        "key_mask": key_mask is not None,
        "backward": torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
    }


def _check_window(window: int | None, causal: bool) -> None:
    if window is None:
        return
    check_integer("window", window, 1)
    if not causal:
        raise ValueError(f"a window looks back and needs causal=True, got window={window} with causal=False")
