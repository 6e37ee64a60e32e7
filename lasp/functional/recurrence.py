"""What the linear recurrences share: their plan, their heads, states by document, and their checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lasp.functional.checks import check_beside, check_heads
from lasp.functional.heads import check_deal
from lasp.kernels.arguments import check_integer, check_number, check_tensors
from lasp.kernels.precision import compute_dtype
from lasp.kernels.values import check_values, may_look_at
from lasp.parallel.call import Arguments, Turn
from lasp.parallel.group import SequenceGroup
from lasp.parallel.layout import Plan
from lasp.parallel.scan import Heads, Scan, check_scan

Runs = tuple[tuple[int, int], ...]


def plan_call(turn: Turn, tokens: int, packed: bool, steps: int = 1) -> tuple[Callable[[], Plan], Runs]:
    """What waits for the ranks' agreement and makes the plan, and the (offset, length) of this rank's runs.

    tokens: this rank's number of them; steps: how many steps of the recurrence each takes.
    """

    def plan() -> Plan:
        return turn().plan(steps)

    # Contiguous and in one document, the runs are known before the ranks have agreed.
    one_run = not packed and (turn.group is None or turn.group.layout == "contiguous")
    return plan, ((0, tokens * steps),) if one_run else plan().local_runs


def by_document(state: Tensor | None, heads: int, packed: bool, dtype: torch.dtype) -> Tensor | None:
    """States [B or documents, h, K, V] as [documents, B, H, K, V] in the compute dtype."""
    if state is None:
        return None
    state = state.to(dtype).repeat_interleave(heads // state.shape[1], 1)
    return state.unsqueeze(1) if packed else state.unsqueeze(0)


def gate_heads(log_decay: Tensor | None) -> int:
    """The number of heads of log-decays [H], [B, T, H] or [B, T, H, K]."""
    if log_decay is None:
        return 1
    return log_decay.shape[0] if log_decay.dim() == 1 else log_decay.shape[2]


def state_heads(*counts: int, initial_state: Tensor | None) -> int:
    """One state per distinct recurrence: queries that share keys, values and gates share a state."""
    return max(*counts, 1 if initial_state is None else initial_state.shape[1])


def whole_results(output: Tensor, final: Tensor | None, packed: bool) -> Tensor | tuple[Tensor, Tensor]:
    """The output, and where there are final states [documents, B, H, K, V] those as the caller knows them."""
    if final is None:
        return output
    return output, final[:, 0] if packed else final[0]


# Checks -------------------------------------------------------------------------------------------------------------


def check_options(
    scale: float | None, scan: str | Scan, chunk_size: int | None, group: SequenceGroup | None
) -> dict[str, Any]:
    """What all ranks of a group must share of the options that every recurrence has."""
    if chunk_size is not None:
        check_integer("chunk_size", chunk_size, 1)
    return {"scale": check_number("scale", scale), "scan": str(check_scan(scan, group))}


def check_recurrence(
    tokens: tuple[Tensor, Tensor, Tensor],
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    bounds: tuple[int, ...] | None,
    options: dict[str, Any],
    ranks: int,
    steps: int = 1,
) -> Arguments:
    """Check q, k, v, the gates and the initial state of a recurrence, and tell what all ranks must share of them.

    bounds: of packed documents. ranks: over which the sequence is cut. steps: rows of the tensors to each token.
    """
    q, k, v = tokens
    _check_decay(q, log_decay)
    heads = {"q": q.shape[2], "k": k.shape[2], "v": v.shape[2]}
    if log_decay is not None:
        heads["log_decay"] = gate_heads(log_decay)
    if beta is not None:
        _check_beta(beta, k)
        heads["beta"] = beta.shape[2]
    if initial_state is not None:
        _check_state(initial_state, q, v, None if bounds is None else len(bounds) - 1)
        heads["initial_state"] = initial_state.shape[1]
    check_heads(heads)
    if options["scan"] == Heads.name:
        check_deal(max(heads.values()), ranks)
    if beta is not None:
        _check_erasure(beta, k)
    tensors = [x for x in (q, k, v, log_decay, beta, initial_state) if x is not None]
    fields = options | {
        "scale": q.shape[3] ** -0.5 if options["scale"] is None else options["scale"],
        "device": q.device.type,
        "batch": q.shape[0],
        "heads": heads,
        "dims": [q.shape[3], v.shape[3]],
        "dtype": str(q.dtype),
        "log_decay": None if log_decay is None else log_decay.dim(),
        "backward": torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
    }
    return Arguments(fields | {"steps": steps}, q.shape[1] // steps, bounds)


def _check_decay(q: Tensor, log_decay: Tensor | None) -> None:
    if log_decay is None:
        return
    check_tensors(log_decay=log_decay)
    shape, kinds = list(log_decay.shape), "[H], [B, T, H] or [B, T, H, K]"
    if log_decay.dim() not in (1, 3, 4):
        raise ValueError(f"log_decay must be {kinds}, got {shape}")
    if log_decay.dim() > 1 and log_decay.shape[:2] != q.shape[:2]:
        raise ValueError(f"log_decay {shape} must share batch and tokens with q {list(q.shape)}")
    if log_decay.dim() == 4 and log_decay.shape[3] != q.shape[3]:
        raise ValueError(f"log_decay {shape} must share its last dim with q {list(q.shape)}")
    check_beside("log_decay", log_decay, q)
    if may_look_at(log_decay):
        check_values(log_decay <= 0, lambda: f"log_decay must be <= 0, got a maximum of {log_decay.max().item()}")


def _check_state(state: Tensor, q: Tensor, v: Tensor, documents: int | None) -> None:
    check_beside("initial_state", state, q)
    rows, what = (q.shape[0], "B") if documents is None else (documents, "documents")
    if state.dim() != 4 or (state.shape[0], *state.shape[2:]) != (rows, q.shape[3], v.shape[3]):
        raise ValueError(
            f"initial_state must be [{what}, H, K, V] = [{rows}, H, {q.shape[3]}, {v.shape[3]}], "
            f"got {list(state.shape)}"
        )


def _check_beta(beta: Tensor, k: Tensor) -> None:
    check_tensors(beta=beta)
    if beta.dim() != 3 or beta.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"beta must be [B, T, H] and share batch and tokens with k {list(k.shape)}, got {list(beta.shape)}"
        )
    check_beside("beta", beta, k)


def _check_erasure(beta: Tensor, k: Tensor) -> None:
    """Beyond `beta·|k|^2 = 2` a token makes what its key held larger, and chunks overflow (2411.12537)."""
    if not may_look_at(beta) or not beta.numel():
        return
    told = "beta must lie in [0, 2], got values from {} to {}"
    check_values((beta >= 0) & (beta <= 2), lambda: told.format(beta.min().item(), beta.max().item()))
    heads = max(beta.shape[2], k.shape[2])
    norms = k.detach().to(compute_dtype(k)).square().sum(-1).repeat_interleave(heads // k.shape[2], 2)
    erased = norms * beta.detach().repeat_interleave(heads // beta.shape[2], 2)
    # A key that was normalised in its own dtype is longer than 1 by a few roundings of it.
    check_values(
        erased <= 2 * (1 + 4 * torch.finfo(k.dtype).eps),
        lambda: f"beta·|k|^2 must not exceed 2 (normalise the keys), got {erased.max().item()}",
    )
