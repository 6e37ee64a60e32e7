"""The delta rule with transfers of a diagonal plus rank one, on one device or over a group of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lasp.functional.checks import check_beside, check_documents, check_tokens, is_packed, ranks_of
from lasp.functional.heads import by_heads, run_by_heads
from lasp.functional.recurrence import by_document, check_options, check_recurrence, plan_call, whole_results
from lasp.kernels.arguments import check_flags, check_tensors
from lasp.kernels.dplr import CHUNK_SIZE, Corrected, DiagonalPlusRankOne
from lasp.kernels.precision import compute_dtype
from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.linear import Call, causal_recurrence
from lasp.parallel.scan import Scan, ScanName, check_scan
from lasp.parallel.untraced import outside


@outside
def dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    read: Tensor,
    erase: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    group: SequenceGroup | None = None,
    cut: Cut | None = None,
    scan: ScanName | Scan = "auto",
    chunk_size: int = CHUNK_SIZE,
) -> Tensor | tuple[Tensor, Tensor]:
    """The delta rule with one key that reads, one that erases and one that writes (RWKV-7, arXiv:2503.14456, eq. 17).

    `S_t = (diag(exp(log_decay_t)) - erase_t read_t^T)·S_{t-1} + k_t v_t^T` and `o_t = scale·S_t^T q_t`: what is read is
    of the state before it fades. q [B, T, Hq, K]; k, read, erase, log_decay [B, T, H, K]; v [B, T, H, V], where H
    divides Hq. The state stays bounded where erase is no more of read than the decay leaves (RWKV-7: read of length 1,
    erase a share of it in every channel); nothing checks that. In plain PyTorch on any device; a chunk is computed
    again in backward. Over a group each rank passes its tokens twice in each direction, and what crosses is as in
    `lasp.delta_rule`.

    All other arguments, the results and the errors are as in `lasp.linear_attention`.
    """
    inputs = Corrected(q, k, v, log_decay, read, erase)

    def check() -> Arguments:
        check_tokens(q, k, v)
        check_flags(output_final_state=output_final_state)
        _check_keys(inputs, initial_state)
        said = check_options(scale, scan, chunk_size, cut.group if cut else group) | {"final_state": output_final_state}
        bounds = check_documents(q, cu_seqlens, cut)
        return check_recurrence((q, k, v), log_decay, None, initial_state, bounds, said, ranks_of(group, cut))

    turn, packed = begin_call(group, "dplr_delta_rule", check, cut), is_packed(cu_seqlens, cut)
    if by_heads(turn, scan):

        def again(*tensors: Tensor, **options: Any) -> Any:
            return dplr_delta_rule(*tensors, scale=scale, chunk_size=chunk_size, **options)

        tensors = (q, k, v, read, erase, log_decay)
        return run_by_heads(turn, again, tensors, initial_state, output_final_state)
    plan, runs = plan_call(turn, q.shape[1], packed)
    used = q.shape[-1] ** -0.5 if scale is None else float(scale)
    recurrence = DiagonalPlusRankOne(runs, k.shape[2], scale=used, causal=True, chunk_size=chunk_size)
    call = Call(recurrence, plan, turn, check_scan(scan), output_final_state)
    state = by_document(initial_state, k.shape[2], packed, compute_dtype(q))
    return whole_results(*causal_recurrence(call, state, inputs), packed)


def _check_keys(inputs: Corrected, state: Tensor | None) -> None:
    q, k, v, *others = inputs
    for name, x in zip(Corrected._fields[3:], others, strict=True):
        check_beside(name, x, q)
        if x.shape != k.shape:
            raise ValueError(f"{name} must be shaped like k, {list(k.shape)}, got {list(x.shape)}")
    if v.shape[2] != k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k and v must have as many heads, a number that divides q's, got {k.shape[2]}, {v.shape[2]}, {q.shape[2]}"
        )
    check_tensors(("initial_state",), initial_state=state)
    if state is not None and state.dim() == 4 and (state.shape[1] < 1 or k.shape[2] % state.shape[1]):
        raise ValueError(f"initial_state must have heads that divide k's {k.shape[2]}, got {list(state.shape)}")
