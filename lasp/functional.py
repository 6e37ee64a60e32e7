"""The token-mixing operations of lasp, on one device or with the sequence cut over a group of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lasp.kernels.backend import decay_stages
from lasp.kernels.decay.recurrence import CHUNK_SIZE, UNMASKED_CHUNK_SIZE, DecayRecurrence
from lasp.kernels.documents import document_bounds
from lasp.kernels.precision import compute_dtype
from lasp.kernels.softmax.blocks import BlockAttention
from lasp.kernels.softmax.mask import Mask
from lasp.parallel import softmax
from lasp.parallel.call import Arguments, begin_call, fingerprint
from lasp.parallel.group import SequenceGroup
from lasp.parallel.layout import Plan, make_plan
from lasp.parallel.linear import Call, bidirectional_recurrence, causal_recurrence
from lasp.parallel.scan import check_scan


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    causal: bool = True,
    group: SequenceGroup | None = None,
    scan: str = "auto",
    backend: str = "auto",
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention, `S_t = diag(exp(log_decay_t))·S_{t-1} + k_t v_t^T` and `o_t = scale·S_t^T q_t`.

    No decay is basic linear attention, one per head Lightning Attention and RetNet, one per token Mamba-2 (SSD), one
    per channel GLA and HGRN2. Over a group this is LASP-2 (arXiv:2502.07563): only states cross between ranks.

    q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V], of one dtype. log_decay: None, [H], [B, T, H] or [B, T, H, K], in
    nats per token, all <= 0. Each may have its own number of heads if every count divides the next larger. Without a
    group T is the whole sequence; with one, q, k, v and per-token gates are this rank's tokens, and everything else
    speaks of the whole sequence.

    scale: of the queries, K**-0.5 by default. initial_state: [B, H, K, V], with cu_seqlens [documents, H, K, V].
    cu_seqlens: bounds of packed documents [documents + 1], for B = 1. causal=False: every token reads its whole
    document; no decay. scan: "auto", "gather" (LASP-2) or "ring" (LASP-1). backend: "auto" or "torch". chunk_size: of
    the kernel, in tokens.

    Returns the output [B, T, Ho, V] in v's dtype; with output_final_state also the final states, shaped like
    initial_state, in fp32 (fp64 for fp64 inputs) and the same on every rank. Differentiable in q, k, v, log_decay and
    initial_state, once. Raises ValueError, on every rank of the group, for arguments that do not fit.
    """

    def check() -> Arguments:
        options = {"causal": causal, "scan": check_scan(scan), "final_state": output_final_state}
        options["scale"] = _check_scale(scale)
        decay_stages(backend)
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ValueError(f"chunk_size must be a whole number of at least 1, got {chunk_size!r}")
        return _check_linear(q, k, v, log_decay, initial_state, cu_seqlens, options)

    lengths = begin_call(group, check)

    @cache
    def plan() -> Plan:
        agreed = lengths()
        bounds = None if cu_seqlens is None else document_bounds(cu_seqlens, sum(agreed))
        rank, layout = (0, "contiguous") if group is None else (group.rank, group.layout)
        return make_plan(agreed, rank, layout, bounds)

    # Contiguous and in one document, the kernel's runs are known before the ranks have agreed.
    one_run = cu_seqlens is None and (group is None or group.layout == "contiguous")
    runs = ((0, q.shape[1]),) if one_run else plan().local_runs
    heads = _state_heads(k, v, log_decay, initial_state)
    recurrence = DecayRecurrence(
        decay_stages(backend),
        runs,
        heads,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=causal,
        chunk_size=chunk_size or (CHUNK_SIZE if causal else UNMASKED_CHUNK_SIZE),
    )
    call = Call(recurrence, plan, group, check_scan(scan), output_final_state)
    state = _by_document(initial_state, heads, cu_seqlens is not None, compute_dtype(q))
    run = causal_recurrence if causal else bidirectional_recurrence
    output, final = run(call, state, (q, k, v, log_decay))
    if final is None:
        return output
    return output, final[0] if cu_seqlens is None else final[:, 0]


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
    method: str = "auto",
) -> Tensor:
    """Softmax attention, `o_t = sum_i softmax(scale·q_t·k_i)_i v_i` over the keys that token t sees.

    q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V], of one dtype. Each may have its own number of heads if every
    count divides the next larger. Without a group T is the whole sequence; with one, q, k, v and key_mask are this
    rank's tokens, and everything else speaks of the whole sequence.

    scale: of the scores, K**-0.5 by default. causal: a token sees itself and what comes before it. window: it sees
    itself and the window - 1 tokens before it, causal only. softcap c: scores become `c·tanh(scores / c)` (Gemma 2).
    sinks [H], H the largest number of heads: one more score per head, of value 0 (gpt-oss). key_mask [B, T]: False
    hides a key. cu_seqlens: bounds of packed documents [documents + 1], for B = 1; no token sees another document's.

    method: "ring" (Ring Attention, arXiv:2310.01889) needs no more memory on more ranks and skips what the mask
    empties; "gather" (LASP-2H, arXiv:2502.07563) is one message, and keeps all keys; "ulysses" (arXiv:2309.14509) deals
    out heads, whose number the ranks must divide; "ulysses_ring" (arXiv:2405.07719) does so over the neighbours of a
    group made with heads=h. "auto" is "ulysses_ring" in such a group if h divides the query heads; else "gather" if
    there is no window and the keys of all ranks have no more heads together than the queries of one (few-headed keys);
    else "ring". Causal work is even over ranks on the zigzag layout.

    Returns the output [B, T, H, V] in v's dtype; 0 where a token sees nothing. Differentiable in q, k, v and sinks,
    once. Raises ValueError, on every rank of the group, for arguments that do not fit.
    """
    options = {"scale": scale, "causal": causal, "window": window, "softcap": softcap, "method": method}

    def check() -> Arguments:
        return _check_softmax((q, k, v), sinks, key_mask, cu_seqlens, group, options)

    lengths = begin_call(group, check)()
    total = sum(lengths)
    bounds = (0, total) if cu_seqlens is None else document_bounds(cu_seqlens, total)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    attention = BlockAttention(Mask(bounds, causal, window), scale, softcap)
    heads, key_heads = _attention_heads(q, k, v)
    chosen = softmax.check_method(method, group, heads, key_heads, window)
    q, k, v = (_with_heads(x, count) for x, count in ((q, heads), (k, key_heads), (v, key_heads)))
    return softmax.shared_attention(softmax.Call(attention, lengths, group, chosen), q, k, v, sinks, key_mask)


def _with_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, h, D] with each head repeated until there are `heads`."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def _attention_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int]:
    """Numbers of heads of queries, and of keys and values: those of few heads are shared."""
    return max(x.shape[2] for x in (q, k, v)), max(k.shape[2], v.shape[2])


def _by_document(state: Tensor | None, heads: int, packed: bool, dtype: torch.dtype) -> Tensor | None:
    """States [B or documents, h, K, V] as [documents, B, H, K, V] in the compute dtype."""
    if state is None:
        return None
    state = state.to(dtype).repeat_interleave(heads // state.shape[1], 1)
    return state.unsqueeze(1) if packed else state.unsqueeze(0)


def _gate_heads(log_decay: Tensor | None) -> int:
    if log_decay is None:
        return 1
    return log_decay.shape[0] if log_decay.dim() == 1 else log_decay.shape[2]


def _state_heads(k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None) -> int:
    """One state per distinct recurrence: queries that share keys and values share a state."""
    given = 1 if initial_state is None else initial_state.shape[1]
    return max(k.shape[2], v.shape[2], _gate_heads(log_decay), given)


# Checks -------------------------------------------------------------------------------------------------------------


def _check_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | Sequence[int] | None,
    options: dict[str, Any],
) -> Arguments:
    _check_tokens(q, k, v)
    _check_decay(q, log_decay, options["causal"])
    bounds = _check_documents(q, cu_seqlens)
    heads = {"q": q.shape[2], "k": k.shape[2], "v": v.shape[2]}
    if log_decay is not None:
        heads["log_decay"] = _gate_heads(log_decay)
    if initial_state is not None:
        _check_state(initial_state, q, v, None if bounds is None else len(bounds) - 1)
        heads["initial_state"] = initial_state.shape[1]
    _check_heads(heads)
    tensors = [x for x in (q, k, v, log_decay, initial_state) if x is not None]
    fields = options | {
        "batch": q.shape[0],
        "heads": heads,
        "dims": [q.shape[3], v.shape[3]],
        "dtype": str(q.dtype),
        "log_decay": None if log_decay is None else log_decay.dim(),
        "cu_seqlens": None if bounds is None else fingerprint(bounds),
        "backward": torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
    }
    return Arguments(fields, q.shape[1], None if bounds is None else bounds[-1])


def _check_softmax(
    tokens: tuple[Tensor, Tensor, Tensor],
    sinks: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | Sequence[int] | None,
    group: SequenceGroup | None,
    options: dict[str, Any],
) -> Arguments:
    q, k, v = tokens
    _check_tokens(q, k, v)
    bounds = _check_documents(q, cu_seqlens)
    heads = {"q": q.shape[2], "k": k.shape[2], "v": v.shape[2]}
    _check_heads(heads)
    _check_window(options["window"], options["causal"])
    if options["softcap"] is not None and not options["softcap"] > 0:
        raise ValueError(f"softcap must be positive, got {options['softcap']}")
    query_heads, key_heads = _attention_heads(q, k, v)
    if sinks is not None and (list(sinks.shape) != [query_heads] or not sinks.is_floating_point()):
        raise ValueError(f"sinks must be floating [{query_heads}], got {sinks.dtype} {list(sinks.shape)}")
    if key_mask is not None and (key_mask.shape != q.shape[:2] or key_mask.dtype != torch.bool):
        raise ValueError(f"key_mask must be bool {list(q.shape[:2])}, got {key_mask.dtype} {list(key_mask.shape)}")
    method = softmax.check_method(options["method"], group, query_heads, key_heads, options["window"])
    tensors = [x for x in (q, k, v, sinks) if x is not None]
    fields = options | {
        "method": method,
        "batch": q.shape[0],
        "heads": heads,
        "dims": [q.shape[3], v.shape[3]],
        "dtype": str(q.dtype),
        "sinks": sinks is not None,
        "key_mask": key_mask is not None,
        "cu_seqlens": None if bounds is None else fingerprint(bounds),
        "backward": torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
    }
    return Arguments(fields, q.shape[1], None if bounds is None else bounds[-1])


def _check_window(window: int | None, causal: bool) -> None:
    if window is None:
        return
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"window must be an integer of at least 1, got {window!r}")
    if not causal:
        raise ValueError(f"a window looks back and needs causal=True, got window={window} with causal=False")


def _check_documents(q: Tensor, cu_seqlens: Tensor | Sequence[int] | None) -> tuple[int, ...] | None:
    """The bounds of packed documents; whether they end where the sequence does is known when the ranks have agreed."""
    if cu_seqlens is None:
        return None
    values = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    bounds = document_bounds(cu_seqlens, values[-1] if values else 0)
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs documents into one sequence and needs B = 1, got B = {q.shape[0]}")
    return bounds


def _check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
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


def _check_decay(q: Tensor, log_decay: Tensor | None, causal: bool) -> None:
    if log_decay is None:
        return
    if not causal:
        raise ValueError("causal=False takes no log_decay: a token has no last token to decay from")
    shape, kinds = list(log_decay.shape), "[H], [B, T, H] or [B, T, H, K]"
    if log_decay.dim() not in (1, 3, 4):
        raise ValueError(f"log_decay must be {kinds}, got {shape}")
    if log_decay.dim() > 1 and log_decay.shape[:2] != q.shape[:2]:
        raise ValueError(f"log_decay {shape} must share batch and tokens with q {list(q.shape)}")
    if log_decay.dim() == 4 and log_decay.shape[3] != q.shape[3]:
        raise ValueError(f"log_decay {shape} must share its last dim with q {list(q.shape)}")
    _check_beside("log_decay", log_decay, q)
    # On an accelerator the check would wait for the device; `lasp.verify` makes it there.
    if log_decay.device.type == "cpu" and not bool((log_decay <= 0).all()):
        raise ValueError(f"log_decay must be <= 0, got a maximum of {log_decay.max().item()}")


def _check_scale(scale: float | None) -> float | None:
    """The scale as a plain number, which a header can carry."""
    if scale is None:
        return None
    if isinstance(scale, str) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    return float(scale)


def _check_beside(name: str, x: Tensor, q: Tensor) -> None:
    if not x.is_floating_point() or x.device != q.device:
        raise ValueError(f"{name} must be floating and on the device of q, {q.device}, got {x.dtype} on {x.device}")


def _check_state(state: Tensor, q: Tensor, v: Tensor, documents: int | None) -> None:
    _check_beside("initial_state", state, q)
    rows, what = (q.shape[0], "B") if documents is None else (documents, "documents")
    if state.dim() != 4 or (state.shape[0], *state.shape[2:]) != (rows, q.shape[3], v.shape[3]):
        raise ValueError(
            f"initial_state must be [{what}, H, K, V] = [{rows}, H, {q.shape[3]}, {v.shape[3]}], "
            f"got {list(state.shape)}"
        )


def _check_heads(heads: dict[str, int]) -> None:
    counts = sorted(set(heads.values()))
    for fewer, more in pairwise(counts):
        if more % fewer:
            raise ValueError(f"numbers of heads must divide one another, got {heads}")
