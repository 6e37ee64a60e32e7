"""Linear attention, on one device or with the sequence cut over a group of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, Unpack, overload

from torch import Tensor

from lasp.functional.checks import check_documents, check_tokens, is_packed, ranks_of
from lasp.functional.documents import short_documents
from lasp.functional.heads import by_heads, run_by_heads
from lasp.functional.options import RecurrenceOptions
from lasp.functional.recurrence import (
    by_document,
    check_options,
    check_recurrence,
    gate_heads,
    plan_call,
    state_heads,
    whole_results,
)
from lasp.kernels.arguments import check_flags
from lasp.kernels.backend import Backend, implementation
from lasp.kernels.chunks import CHUNK_SIZE, UNMASKED_CHUNK_SIZE
from lasp.kernels.inputs import Inputs
from lasp.kernels.portable.recurrence import PortableRecurrence
from lasp.kernels.precision import compute_dtype
from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.linear import Call, bidirectional_recurrence, causal_recurrence
from lasp.parallel.scan import Scan, ScanName, check_scan
from lasp.parallel.untraced import untraced


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    output_final_state: Literal[False] = False,
    causal: bool = True,
    **options: Unpack[RecurrenceOptions],
) -> Tensor: ...
@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    output_final_state: Literal[True],
    causal: bool = True,
    **options: Unpack[RecurrenceOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    output_final_state: bool,
    causal: bool = True,
    **options: Unpack[RecurrenceOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
@untraced
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
    cut: Cut | None = None,
    scan: ScanName | Scan = "auto",
    backend: Backend = "auto",
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
    cu_seqlens: bounds of packed documents [documents + 1], for B = 1. cut: that of the batch (`lasp.shard_batch`), in
    the place of group and cu_seqlens; only data is exchanged then. causal=False: every token reads its whole document;
    no decay. scan: "auto" (the cheapest over the group's wires) or one of `lasp.parallel.scan`, by name or with options
    (`Pipeline(blocks=4)`): "gather" (LASP-2), "ring" (LASP-1), "doubling", "pipeline" (ZeCO), "two_level"; "heads"
    exchanges tokens for heads instead, which the ranks must divide (Ulysses, arXiv:2309.14509). backend: "torch",
    "triton", "fla" (both on a GPU, fp32 and shorter) or "auto" (`lasp.backend_report`). chunk_size: of the kernel, in
    tokens; of Triton's 16, 32 or 64, of flash-linear-attention's 64.

    Returns the output [B, T, Ho, V] in v's dtype; with output_final_state also the final states, shaped like
    initial_state, in fp32 (fp64 for fp64 inputs) and the same on every rank. Differentiable in q, k, v, log_decay and
    initial_state, once. Raises ValueError, on every rank of the group, for arguments that do not fit.
    """

    def check() -> Arguments:
        check_tokens(q, k, v)
        check_flags(causal=causal, output_final_state=output_final_state)
        if log_decay is not None and not causal:
            raise ValueError("causal=False takes no log_decay: a token has no last token to decay from")
        implementation(backend, q, chunk_size, causal)
        options = check_options(scale, scan, chunk_size, cut.group if cut else group)
        options |= {"causal": causal, "final_state": output_final_state}
        bounds = check_documents(q, cu_seqlens, cut)
        return check_recurrence((q, k, v), log_decay, None, initial_state, bounds, options, ranks_of(group, cut))

    turn, packed = begin_call(group, "linear_attention", check, cut), is_packed(cu_seqlens, cut)
    again = partial(linear_attention, scale=scale, causal=causal, backend=backend, chunk_size=chunk_size)
    if by_heads(turn, scan):
        return run_by_heads(turn, again, (q, k, v, log_decay), initial_state, output_final_state)
    kind = implementation(backend, q, chunk_size, causal)
    longest = chunk_size or (CHUNK_SIZE if causal else UNMASKED_CHUNK_SIZE)
    short = short_documents(turn, packed, 1, longest) if kind is PortableRecurrence else None
    if short is not None:
        output, final = short.run(again, (q, k, v, log_decay), initial_state)
        return (output, final) if output_final_state else output
    plan, runs = plan_call(turn, q.shape[1], packed)
    heads = state_heads(k.shape[2], v.shape[2], gate_heads(log_decay), initial_state=initial_state)
    recurrence = kind(
        runs,
        heads,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=causal,
        chunk_size=longest,
    )
    call = Call(recurrence, plan, turn, check_scan(scan), output_final_state)
    state = by_document(initial_state, heads, packed, compute_dtype(q))
    run = causal_recurrence if causal else bidirectional_recurrence
    return whole_results(*run(call, state, Inputs(q, k, v, log_decay)), packed)
