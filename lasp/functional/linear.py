"""Linear attention, on one device or with the sequence cut over a group of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lasp.functional.checks import check_beside, check_documents, check_heads, check_scale, check_tokens
from lasp.kernels.backend import decay_stages
from lasp.kernels.decay.recurrence import CHUNK_SIZE, UNMASKED_CHUNK_SIZE, DecayRecurrence
from lasp.kernels.documents import document_bounds
from lasp.kernels.precision import compute_dtype
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
        options["scale"] = check_scale(scale)
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
    heads = state_heads(k, v, log_decay, initial_state)
    recurrence = DecayRecurrence(
        decay_stages(backend),
        runs,
        heads,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=causal,
        chunk_size=chunk_size or (CHUNK_SIZE if causal else UNMASKED_CHUNK_SIZE),
    )
    call = Call(recurrence, plan, group, check_scan(scan), output_final_state)
    state = by_document(initial_state, heads, cu_seqlens is not None, compute_dtype(q))
    run = causal_recurrence if causal else bidirectional_recurrence
    output, final = run(call, state, (q, k, v, log_decay))
    if final is None:
        return output
    return output, final[0] if cu_seqlens is None else final[:, 0]


def by_document(state: Tensor | None, heads: int, packed: bool, dtype: torch.dtype) -> Tensor | None:
    """States [B or documents, h, K, V] as [documents, B, H, K, V] in the compute dtype."""
    if state is None:
        return None
    state = state.to(dtype).repeat_interleave(heads // state.shape[1], 1)
    return state.unsqueeze(1) if packed else state.unsqueeze(0)


def gate_heads(log_decay: Tensor | None) -> int:
    if log_decay is None:
        return 1
    return log_decay.shape[0] if log_decay.dim() == 1 else log_decay.shape[2]


def state_heads(k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None) -> int:
    """One state per distinct recurrence: queries that share keys and values share a state."""
    given = 1 if initial_state is None else initial_state.shape[1]
    return max(k.shape[2], v.shape[2], gate_heads(log_decay), given)


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
    check_tokens(q, k, v)
    check_decay(q, log_decay, options["causal"])
    bounds = check_documents(q, cu_seqlens)
    heads = {"q": q.shape[2], "k": k.shape[2], "v": v.shape[2]}
    if log_decay is not None:
        heads["log_decay"] = gate_heads(log_decay)
    if initial_state is not None:
        check_state(initial_state, q, v, None if bounds is None else len(bounds) - 1)
        heads["initial_state"] = initial_state.shape[1]
    check_heads(heads)
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


def check_decay(q: Tensor, log_decay: Tensor | None, causal: bool) -> None:
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
    check_beside("log_decay", log_decay, q)
    # On an accelerator the check would wait for the device; `lasp.verify` makes it there.
    if log_decay.device.type == "cpu" and not bool((log_decay <= 0).all()):
        raise ValueError(f"log_decay must be <= 0, got a maximum of {log_decay.max().item()}")


def check_state(state: Tensor, q: Tensor, v: Tensor, documents: int | None) -> None:
    check_beside("initial_state", state, q)
    rows, what = (q.shape[0], "B") if documents is None else (documents, "documents")
    if state.dim() != 4 or (state.shape[0], *state.shape[2:]) != (rows, q.shape[3], v.shape[3]):
        raise ValueError(
            f"initial_state must be [{what}, H, K, V] = [{rows}, H, {q.shape[3]}, {v.shape[3]}], "
            f"got {list(state.shape)}"
        )
