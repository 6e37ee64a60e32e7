"""Running maximum of what decays, on one device or with the sequence cut over a group of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lasp.functional.checks import check_beside, check_documents, is_packed
from lasp.kernels.arguments import check_flags, check_tensors
from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.halo import Halo, share_ends
from lasp.parallel.maximum import running_maxima
from lasp.parallel.scan import Scan, ScanName, check_scan
from lasp.parallel.untraced import outside


@outside
def running_maximum(
    x: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    group: SequenceGroup | None = None,
    cut: Cut | None = None,
    scan: ScanName | Scan = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`m_t = max(m_{t-1} + log_decay_t, x_t)`: what stabilises the exponential gates of an mLSTM (arXiv:2405.04517).

    x, log_decay [B, T, H]; -inf in x adds nothing. initial_state: [B, H], with cu_seqlens [documents, H]; None for
    nothing (-inf). Returns m_{t-1} and m_t of all tokens, [B, T, H] in fp64, and where asked the last m of each
    sequence or document, the same on every rank, or None. Not differentiable. All other arguments and the errors are
    as in `logcumsumexp`.
    """

    def check() -> Arguments:
        check_tensors(("initial_state",), x=x, log_decay=log_decay, initial_state=initial_state)
        check_flags(output_final_state=output_final_state)
        check_beside("log_decay", log_decay, x, "x")
        if x.dim() != 3 or x.shape != log_decay.shape or not x.is_floating_point() or x.shape[0] < 1:
            raise ValueError(
                f"x and log_decay must be floating [B, T, H], got {list(x.shape)}, {list(log_decay.shape)}"
            )
        if initial_state is not None:
            check_beside("initial_state", initial_state, x, "x")
        bounds = check_documents(x, cu_seqlens, cut)
        rows = [x.shape[0] if bounds is None else len(bounds) - 1, x.shape[2]]
        if initial_state is not None and list(initial_state.shape) != rows:
            raise ValueError(f"initial_state must be {rows}, got {list(initial_state.shape)}")
        fields = {
            "scan": str(check_scan(scan, cut.group if cut else group)),
            "final_state": output_final_state,
            "device": x.device.type,
            "shape": [x.shape[0], x.shape[2]],
            "initial_state": initial_state is not None,
        }
        return Arguments(fields, x.shape[1], bounds)

    turn, packed = begin_call(group, "running_maximum", check, cut), is_packed(cu_seqlens, cut)
    plan = turn().plan()
    with torch.no_grad():
        values, decays = x.double(), log_decay.double()
        if initial_state is None:
            initial = values.new_full((plan.documents, x.shape[0], x.shape[2]), -torch.inf)
        else:
            initial = initial_state.double().unsqueeze(1 if packed else 0)
        rows = running_maxima(plan, turn, check_scan(scan), values, decays, initial)
        before, highest = (torch.cat(parts, 1) for parts in ([r[:, :-1] for r in rows], [r[:, 1:] for r in rows]))
        if not output_final_state:
            return before, highest, None
        highest, final = share_ends(Halo(plan, turn, 1, ()), highest, [row[:, -1] for row in rows])
        return before, highest, final[:, 0] if packed else final[0]
