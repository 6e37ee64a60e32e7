"""Running log-sum-exp, on one device or with the sequence cut over a group of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from lasp.functional.checks import check_beside, check_documents, is_packed
from lasp.functional.options import SequenceOptions
from lasp.kernels.arguments import check_flags, check_tensors
from lasp.kernels.precision import compute_dtype
from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.halo import Halo, share_ends
from lasp.parallel.logcumsumexp import running_sums
from lasp.parallel.scan import Scan, ScanName, check_scan
from lasp.parallel.untraced import untraced


@overload
def logcumsumexp(
    x: Tensor,
    *,
    output_final_state: Literal[False] = False,
    exclusive: bool = False,
    scan: ScanName | Scan = "auto",
    **options: Unpack[SequenceOptions],
) -> Tensor: ...
@overload
def logcumsumexp(
    x: Tensor,
    *,
    output_final_state: Literal[True],
    exclusive: bool = False,
    scan: ScanName | Scan = "auto",
    **options: Unpack[SequenceOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def logcumsumexp(
    x: Tensor,
    *,
    output_final_state: bool,
    exclusive: bool = False,
    scan: ScanName | Scan = "auto",
    **options: Unpack[SequenceOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
@untraced
def logcumsumexp(
    x: Tensor,
    *,
    exclusive: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    group: SequenceGroup | None = None,
    cut: Cut | None = None,
    scan: ScanName | Scan = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Running log-sum-exp over the tokens of a document, `z_t = logaddexp(z_{t-1}, x_t)`, behind z_0 = initial_state.

    What stabilises gates that divide by a running sum, as those of LightNet (arXiv:2405.21022): a scan of its own
    ahead of an ordinary `linear_attention`. Over a group, a row [B, ...] per rank crosses in each direction.

    x [B, T, ...]; -inf adds nothing. Without a group T is the whole sequence; with one, x is this rank's tokens, and
    everything else speaks of the whole sequence. exclusive: z_{t-1} in the place of z_t. initial_state: [B, ...], with
    cu_seqlens [documents, ...]; nothing (-inf) if None. cu_seqlens: bounds of packed documents [documents + 1], for
    B = 1. cut: in the place of group and cu_seqlens, as in `linear_attention`. scan: how the rows cross, as there.

    Returns z [B, T, ...] in fp32 (fp64 for fp64 inputs), and with output_final_state also the last z of each sequence
    or document, shaped like initial_state and the same on every rank. Differentiable in x and initial_state, once.
    Raises ValueError, on every rank of the group, for arguments that do not fit.
    """

    def check() -> Arguments:
        options = {
            "exclusive": exclusive,
            "final_state": output_final_state,
            "scan": str(check_scan(scan, cut.group if cut else group)),
        }
        return _check(x, initial_state, lambda: check_documents(x, cu_seqlens, cut), options)

    turn, packed = begin_call(group, "logcumsumexp", check, cut), is_packed(cu_seqlens, cut)
    plan = turn().plan()
    dtype = compute_dtype(x)
    if initial_state is None:
        initial = x.new_full((plan.documents, x.shape[0], *x.shape[2:]), -torch.inf, dtype=dtype)
    else:
        initial = initial_state.to(dtype).unsqueeze(1 if packed else 0)
    rows = running_sums(plan, turn, check_scan(scan), x.to(dtype), initial)
    z = torch.cat([row[:, :-1] if exclusive else row[:, 1:] for row in rows], 1)
    if not output_final_state:
        return z
    z, final = share_ends(Halo(plan, turn, 1, ()), z, [row[:, -1] for row in rows])
    return z, final[:, 0] if packed else final[0]


def _check(
    x: Tensor,
    initial_state: Tensor | None,
    check_bounds: Callable[[], tuple[int, ...] | None],
    options: dict[str, Any],
) -> Arguments:
    check_tensors(("initial_state",), x=x, initial_state=initial_state)
    check_flags(exclusive=options["exclusive"], output_final_state=options["final_state"])
    if x.dim() < 2 or not x.is_floating_point() or x.shape[0] < 1:
        raise ValueError(f"x must be floating [batch, tokens, ...], got {x.dtype} {list(x.shape)}")
    bounds = check_bounds()
    if initial_state is not None:
        check_beside("initial_state", initial_state, x, "x")
        rows, what = (x.shape[0], "B") if bounds is None else (len(bounds) - 1, "documents")
        if list(initial_state.shape) != [rows, *x.shape[2:]]:
            raise ValueError(
                f"initial_state must be [{what}, ...] = {[rows, *x.shape[2:]]}, got {list(initial_state.shape)}"
            )
    tensors = [x] if initial_state is None else [x, initial_state]
    fields = options | {
        "device": x.device.type,
        "shape": [x.shape[0], *x.shape[2:]],
        "dtype": str(x.dtype),
        "initial_state": initial_state is not None,
        "backward": torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
    }
    return Arguments(fields, x.shape[1], bounds)
