"""The scalar memory of sLSTM, on one device or passed from rank to rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lasp.functional.checks import check_beside, check_documents, is_packed
from lasp.functional.recurrence import by_document, plan_call, whole_results
from lasp.kernels.arguments import check_flags, check_integer, check_tensors
from lasp.kernels.precision import compute_dtype
from lasp.kernels.slstm import CHUNK_SIZE, Gated, ScalarMemory
from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.linear import Call, causal_recurrence
from lasp.parallel.passing import passed_recurrence
from lasp.parallel.scan import check_scan
from lasp.parallel.untraced import outside


@outside
def slstm(
    gates: Tensor,
    recurrent: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    group: SequenceGroup | None = None,
    cut: Cut | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor | tuple[Tensor, Tensor]:
    """`c_t = f c_{t-1} + i z`, `n_t = f n_{t-1} + i`, `h_t = o c_t / n_t`, with gates that read h_{t-1}.

    (xLSTM, arXiv:2405.04517, equations 8 to 18.)
    gates [B, T, 4, H, D]: what x says of z, i, f and o, ahead of tanh, exp and twice sigmoid; recurrent [4, H, D, D]:
    what the last output adds to them, `h_{t-1}^T R`. Token by token on any device; every chunk_size-th state is kept,
    and what lies between is computed again in backward. Over a group a rank waits for the state of the one before,
    sequence by sequence of the batch: W ranks work at the same time only on different ones, (B + W - 1) / B times as
    long as if none had to wait.

    Returns h [B, T, H, D], and where asked the final states [B or documents, H, D, 4] of h, c, n and m, in fp32 (fp64
    for fp64 inputs): c and n stand for theirs times exp(m), and m has no gradient. All other arguments and the errors
    are as in `lasp.linear_attention`.
    """

    def check() -> Arguments:
        check_tensors(("initial_state",), gates=gates, recurrent=recurrent, initial_state=initial_state)
        check_flags(output_final_state=output_final_state)
        check_integer("chunk_size", chunk_size, 1)
        check_beside("recurrent", recurrent, gates, "gates")
        if gates.dim() != 5 or gates.shape[2] != 4 or not gates.is_floating_point() or min(gates.shape[0], 1) < 1:
            raise ValueError(f"gates must be floating [B, T, 4, H, D], got {gates.dtype} {list(gates.shape)}")
        heads, dim = gates.shape[3:]
        if list(recurrent.shape) != [4, heads, dim, dim]:
            raise ValueError(f"recurrent must be {[4, heads, dim, dim]}, got {list(recurrent.shape)}")
        bounds = check_documents(gates, cu_seqlens, cut)
        rows = [gates.shape[0] if bounds is None else len(bounds) - 1, heads, dim, 4]
        if initial_state is not None:
            check_beside("initial_state", initial_state, gates, "gates")
        if initial_state is not None and list(initial_state.shape) != rows:
            raise ValueError(f"initial_state must be {rows}, got {list(initial_state.shape)}")
        tensors = (gates, recurrent, initial_state)
        fields = {
            "final_state": output_final_state,
            "device": gates.device.type,
            "shape": [gates.shape[0], *gates.shape[2:]],
            "dtype": str(gates.dtype),
            "initial_state": initial_state is not None,
            "backward": torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors),
        }
        return Arguments(fields, gates.shape[1], bounds)

    turn, packed = begin_call(group, "slstm", check, cut), is_packed(cu_seqlens, cut)
    plan, runs = plan_call(turn, gates.shape[1], packed)
    recurrence = ScalarMemory(runs, gates.shape[3], scale=1.0, causal=True, chunk_size=chunk_size)
    call = Call(recurrence, plan, turn, check_scan("auto"), output_final_state)
    state = by_document(initial_state, gates.shape[3], packed, compute_dtype(gates))
    run = causal_recurrence if turn.group is None else passed_recurrence
    return whole_results(*run(call, state, Gated(gates, recurrent)), packed)
