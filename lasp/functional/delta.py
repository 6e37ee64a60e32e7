"""The delta rule, on one device or with the sequence cut over a group of ranks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lasp.functional.recurrence import (
    by_document,
    check_options,
    check_recurrence,
    gate_heads,
    plan_call,
    state_heads,
    whole_results,
)
from lasp.kernels.backend import delta_stages
from lasp.kernels.decay.recurrence import CHUNK_SIZE
from lasp.kernels.delta.recurrence import DeltaRecurrence
from lasp.kernels.precision import compute_dtype
from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.group import SequenceGroup
from lasp.parallel.linear import Call, causal_recurrence
from lasp.parallel.scan import check_scan


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    group: SequenceGroup | None = None,
    scan: str = "auto",
    backend: str = "auto",
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The delta rule: a token first erases what its key holds, then writes its value there.

    `S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t))·S_{t-1} + beta_t k_t v_t^T` and `o_t = scale·S_t^T q_t`. No
    decay is DeltaNet (arXiv:2406.06484), one per token Gated DeltaNet (arXiv:2412.06464), one per channel Kimi Delta
    Attention (arXiv:2510.26692). Over a group only states cross between ranks, and with "gather" in the forward pass
    also the dense [K, K] maps of the ranks' stretches.

    q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V], of one dtype. beta [B, T, H] in [0, 2]; beyond 1 it turns what
    the key held around (arXiv:2411.12537). log_decay: None, [B, T, H] or [B, T, H, K], in nats per token, all <= 0.
    Each may have its own number of heads if every count divides the next larger. Keys are expected L2-normalised:
    beta·|k|^2 must not exceed 2. Without a group T is the whole sequence; with one, q, k, v, beta and log_decay are
    this rank's tokens, and everything else speaks of the whole sequence.

    All other arguments, the results and what is refused are as in `linear_attention`. Differentiable in q, k, v, beta,
    log_decay and initial_state, once. On accelerators the ranges of beta and log_decay are not checked.
    """

    def check() -> Arguments:
        if log_decay is not None and log_decay.dim() == 1:
            raise ValueError(f"log_decay must be [B, T, H] or [B, T, H, K], got {list(log_decay.shape)}")
        delta_stages(backend)
        options = check_options(scale, scan, chunk_size) | {"final_state": output_final_state}
        return check_recurrence((q, k, v), log_decay, beta, initial_state, cu_seqlens, options)

    plan, runs = plan_call(begin_call(group, check), q.shape[1], cu_seqlens, group)
    counts = k.shape[2], v.shape[2], beta.shape[2], gate_heads(log_decay)
    heads = state_heads(*counts, initial_state=initial_state)
    recurrence = DeltaRecurrence(
        delta_stages(backend),
        runs,
        heads,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=True,
        chunk_size=chunk_size or CHUNK_SIZE,
    )
    call = Call(recurrence, plan, group, check_scan(scan), output_final_state)
    state = by_document(initial_state, heads, cu_seqlens is not None, compute_dtype(q))
    return whole_results(*causal_recurrence(call, state, (q, k, v, log_decay, beta)), packed=cu_seqlens is not None)
