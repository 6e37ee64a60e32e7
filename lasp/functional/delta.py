"""The delta rule, on one device or with the sequence cut over a group of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple, Unpack, overload

import torch
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
from lasp.kernels.arguments import check_flags, check_tensors
from lasp.kernels.backend import Backend, implementation
from lasp.kernels.chunks import CHUNK_SIZE
from lasp.kernels.inputs import Inputs
from lasp.kernels.portable.recurrence import PortableRecurrence
from lasp.kernels.precision import compute_dtype
from lasp.parallel.call import Arguments, begin_call, together
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.linear import Call, causal_recurrence
from lasp.parallel.scan import Scan, ScanName, check_scan
from lasp.parallel.untraced import untraced


@overload
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    output_final_state: Literal[False] = False,
    **options: Unpack[RecurrenceOptions],
) -> Tensor: ...
@overload
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    output_final_state: Literal[True],
    **options: Unpack[RecurrenceOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    output_final_state: bool,
    **options: Unpack[RecurrenceOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
@untraced
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
    cut: Cut | None = None,
    scan: ScanName | Scan = "auto",
    backend: Backend = "auto",
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The delta rule: a token first erases what its key holds, then writes its value there.

    `S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t))·S_{t-1} + beta_t k_t v_t^T` and `o_t = scale·S_t^T q_t`. No
    decay is DeltaNet (arXiv:2406.06484), one per token Gated DeltaNet (arXiv:2412.06464), one per channel Kimi Delta
    Attention (arXiv:2510.26692). Over a group only states cross between ranks, and with "gather" in the forward pass
    (with "doubling" in both) also the dense [K, K] maps of the ranks' stretches.

    q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V], of one dtype. beta [B, T, H] in [0, 2]; beyond 1 it turns what
    the key held around (arXiv:2411.12537). log_decay: None, [B, T, H] or [B, T, H, K], in nats per token, all <= 0.
    Each may have its own number of heads if every count divides the next larger. Keys are expected L2-normalised:
    beta·|k|^2 must not exceed 2. Without a group T is the whole sequence; with one, q, k, v, beta and log_decay are
    this rank's tokens, and everything else speaks of the whole sequence.

    All other arguments, the results and what is refused are as in `linear_attention`. Differentiable in q, k, v, beta,
    log_decay and initial_state, once. On accelerators the ranges of beta and log_decay are not checked.
    """

    options = _Options(scale, initial_state, output_final_state, cu_seqlens, group, cut, scan, backend, chunk_size)
    return _delta("delta_rule", Inputs(q, k, v, log_decay, beta), 1, options)


@overload
def delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    output_final_state: Literal[False] = False,
    **options: Unpack[RecurrenceOptions],
) -> Tensor: ...
@overload
def delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    output_final_state: Literal[True],
    **options: Unpack[RecurrenceOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    output_final_state: bool,
    **options: Unpack[RecurrenceOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
@untraced
def delta_product(
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
    cut: Cut | None = None,
    scan: ScanName | Scan = "auto",
    backend: Backend = "auto",
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The delta rule with n steps to a token (DeltaProduct, arXiv:2502.10297): products of n Householder matrices.

    q [B, T, Hq, K], k [B, T, n, Hk, K], v [B, T, n, Hv, V], beta [B, T, n, H]; log_decay as in `delta_rule`. The first
    step of a token decays, and the state after its last is read. chunk_size counts steps. Everything else, the
    results and the errors are as in `delta_rule`, of which this is a call over n·T rows.
    """
    steps, rows = together(group, "delta_product", lambda: _as_steps(q, k, v, beta, log_decay))
    options = _Options(scale, initial_state, output_final_state, cu_seqlens, group, cut, scan, backend, chunk_size)
    result = _delta("delta_product", rows, steps, options)
    if isinstance(result, tuple):
        return result[0][:, steps - 1 :: steps], result[1]
    return result[:, steps - 1 :: steps]


def _as_steps(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> tuple[int, Inputs]:
    """The number of steps to a token, and the arguments of a delta rule over rows of which each token has so many."""
    check_tensors(("log_decay",), q=q, k=k, v=v, beta=beta, log_decay=log_decay)
    if q.dim() != 4:
        raise ValueError(f"q must be [B, T, H, K], got {list(q.shape)}")
    if not (k.dim() == v.dim() == 5 and beta.dim() == 4 and k.shape[2] == v.shape[2] == beta.shape[2] >= 1):
        shapes = f"k {list(k.shape)}, v {list(v.shape)}, beta {list(beta.shape)}"
        raise ValueError(f"k, v and beta must be [B, T, n, H, ...] with the same n >= 1, got {shapes}")
    steps = k.shape[2]
    if log_decay is not None and log_decay.dim() in (3, 4):
        log_decay = _on_step(log_decay, steps, 0)
    k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
    return steps, Inputs(_on_step(q, steps, steps - 1), k, v, log_decay, beta)


def _on_step(x: Tensor, steps: int, step: int) -> Tensor:
    """[B, T, ...] as [B, n·T, ...], each token's row at one of its steps, and 0 at the others."""
    nothing = torch.zeros_like(x)
    return torch.stack([x if i == step else nothing for i in range(steps)], 2).flatten(1, 2)


class _Options(NamedTuple):
    """The keywords of both operations."""

    scale: float | None
    initial_state: Tensor | None
    output_final_state: bool
    cu_seqlens: Tensor | Sequence[int] | None
    group: SequenceGroup | None
    cut: Cut | None
    scan: ScanName | Scan
    backend: Backend
    chunk_size: int | None


def _delta(operation: str, inputs: Inputs, steps: int, options: _Options) -> Tensor | tuple[Tensor, Tensor]:
    """`delta_rule` over rows of which each token of the sequence has `steps`."""
    q, k, v, log_decay, beta = inputs
    scale, initial_state, output_final_state, cu_seqlens, group, cut, scan, backend, chunk_size = options

    def check() -> Arguments:
        check_tokens(q, k, v)
        check_tensors(("log_decay",), beta=beta, log_decay=log_decay)
        check_flags(output_final_state=output_final_state)
        if log_decay is not None and log_decay.dim() == 1:
            raise ValueError(f"log_decay must be [B, T, H] or [B, T, H, K], got {list(log_decay.shape)}")
        implementation(backend, q, chunk_size, erases=True)
        said = check_options(scale, scan, chunk_size, cut.group if cut else group) | {"final_state": output_final_state}
        bounds = check_documents(q, cu_seqlens, cut)
        return check_recurrence((q, k, v), log_decay, beta, initial_state, bounds, said, ranks_of(group, cut), steps)

    turn, packed = begin_call(group, operation, check, cut), is_packed(cu_seqlens, cut)
    again = partial(delta_rule, scale=scale, backend=backend, chunk_size=chunk_size)
    if by_heads(turn, scan):
        return run_by_heads(turn, again, (q, k, v, beta, log_decay), initial_state, output_final_state, steps)
    kind = implementation(backend, q, chunk_size, erases=True)
    longest = chunk_size or CHUNK_SIZE
    short = short_documents(turn, packed, steps, longest) if kind is PortableRecurrence else None
    if short is not None:
        output, final = short.run(again, (q, k, v, beta, log_decay), initial_state)
        return (output, final) if output_final_state else output
    plan, runs = plan_call(turn, q.shape[1] // steps, packed, steps)
    assert beta is not None, "checked"
    counts = k.shape[2], v.shape[2], beta.shape[2], gate_heads(log_decay)
    heads = state_heads(*counts, initial_state=initial_state)
    recurrence = kind(
        runs,
        heads,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=True,
        chunk_size=longest,
    )
    call = Call(recurrence, plan, turn, check_scan(scan), output_final_state)
    state = by_document(initial_state, heads, packed, compute_dtype(q))
    return whole_results(*causal_recurrence(call, state, inputs), packed)
