"""The delta rule with several memories, of which each token is sent to some (MoM, arXiv:2502.13685)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lasp.functional.checks import check_documents, is_packed, ranks_of
from lasp.functional.delta import delta_rule
from lasp.functional.recurrence import by_document, check_options, check_recurrence, plan_call, whole_results
from lasp.kernels.arguments import check_flags, check_tensors
from lasp.kernels.backend import Backend, implementation
from lasp.kernels.chunks import CHUNK_SIZE
from lasp.kernels.gathered import Gathered, Rows
from lasp.kernels.inputs import Inputs
from lasp.kernels.precision import compute_dtype
from lasp.kernels.values import check_values, may_look_at
from lasp.parallel.call import Arguments, begin_call, together
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.linear import Call, causal_recurrence
from lasp.parallel.scan import Heads, Scan, ScanName, check_scan
from lasp.parallel.untraced import outside


@outside
def routed_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    memories: Tensor,
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
    """`delta_rule` in each of M memories, over the tokens that are sent to it; to a memory, others are not there.

    q [B, T, Hq, K]; k [B, T, M, H, K], v [B, T, M, H, V], beta, log_decay [B, T, M, H] of every memory; memories
    [B, T, n]: the n different memories that each token is sent to, integers below M. The rows of each memory are
    gathered and stand one behind the other in one call, at the arithmetic of n memories in the place of M. Over a group
    the states of all memories cross in one exchange, whatever each rank sends to them. A token is read back to Python
    for how many rows each memory has: an accelerator is waited for. scan="heads" takes all memories for all tokens, and
    so do fewer tokens than memories on one device, and tensors without values.

    Returns what each token reads in each of its memories, [B, T, n, Hq, V], and where asked the final states
    [B or documents, M·H, K, V], as initial_state. All other arguments and what is refused are as in `delta_rule`.
    """
    options: dict[str, Any] = {
        "scale": scale,
        "initial_state": initial_state,
        "cu_seqlens": cu_seqlens,
        "group": group,
        "cut": cut,
        "scan": scan,
        "backend": backend,
        "chunk_size": chunk_size,
    }
    together(group, "routed_delta_rule", lambda: _check_shapes(q, k, v, beta, log_decay, memories, initial_state))
    valueless = memories.untyped_storage().device.type == "meta"  # fake tensors too
    few = ranks_of(group, cut) == 1 and q.shape[1] < k.shape[2]  # in generation
    if valueless or few or scan == Heads.name or isinstance(scan, Heads):
        return _everywhere(Inputs(q, k, v, log_decay, beta), memories, output_final_state, options)
    batch, tokens, count, heads = k.shape[:4]

    def check() -> Arguments:
        check_flags(output_final_state=output_final_state)
        implementation(backend, q, chunk_size, erases=True)
        said = check_options(scale, scan, chunk_size, cut.group if cut else group)
        said |= {"final_state": output_final_state, "memories": [count, memories.shape[2]]}
        bounds = check_documents(q, cu_seqlens, cut)
        flat = (q[:, :, :1].expand(-1, -1, count * heads, -1), k.flatten(2, 3), v.flatten(2, 3))
        gates = log_decay.flatten(2), beta.flatten(2)
        return check_recurrence(flat, *gates, initial_state, bounds, said, ranks_of(group, cut))

    turn, packed = begin_call(group, "routed_delta_rule", check, cut), is_packed(cu_seqlens, cut)
    plan, runs = plan_call(turn, tokens, packed)
    rows = Rows.of(memories, count, runs)
    token = rows.source // memories.shape[2]
    of_memory = token * count + memories.flatten()[rows.source]
    inputs = Inputs(
        _taken(q.flatten(0, 1), token), *(_taken(x.flatten(0, 2), of_memory) for x in (k, v, log_decay, beta))
    )
    inner = implementation(backend, q, chunk_size, erases=True)(
        rows.runs,
        heads,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=True,
        chunk_size=chunk_size or CHUNK_SIZE,
    )
    call = Call(Gathered.around(inner, batch, len(runs)), plan, turn, check_scan(scan), output_final_state)
    state = by_document(initial_state, count * heads, packed, compute_dtype(q))
    output, final = causal_recurrence(call, state, inputs)
    return whole_results(
        _taken(output[0], rows.place.flatten()).view(*memories.shape, *output.shape[2:]), final, packed
    )


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """Rows [1, R, ...] of x."""
    return x.index_select(0, index).unsqueeze(0)


def _everywhere(
    inputs: Inputs, memories: Tensor, output_final_state: bool, options: dict[str, Any]
) -> Tensor | tuple[Tensor, Tensor]:
    """The same with all memories as heads, in which a token erases, writes and decays nothing where it is not sent."""
    q, k, v, log_decay, beta = inputs
    count = k.shape[2]
    sent = torch.zeros(*k.shape[:3], 1, dtype=torch.bool, device=k.device).scatter(2, memories.unsqueeze(-1), True)
    gates = [torch.where(sent, x, 0).flatten(2) for x in (beta, log_decay) if x is not None]
    result = delta_rule(
        q.repeat(1, 1, count, 1), k.flatten(2, 3), v.flatten(2, 3), *gates,
        output_final_state=output_final_state, **options,
    )  # fmt: skip
    output, final = result if isinstance(result, tuple) else (result, None)
    output = output.unflatten(2, (count, -1)).take_along_dim(memories[..., None, None], 2)
    return output if final is None else (output, final)


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, memories: Tensor, state: Tensor | None
) -> None:
    tensors = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay, "memories": memories}
    check_tensors(("initial_state",), **tensors, initial_state=state)
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, beta {list(beta.shape)}"
    shapes += f", log_decay {list(log_decay.shape)}, memories {list(memories.shape)}"
    if (
        q.dim() != 4
        or k.dim() != 5
        or v.dim() != 5
        or {k.shape[:4], v.shape[:4], beta.shape, log_decay.shape} != {k.shape[:4]}
    ):
        raise ValueError(f"k, v, beta and log_decay must be [B, T, M, H, ...] beside q [B, T, Hq, K], got {shapes}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[4] or q.shape[2] % k.shape[3]:
        raise ValueError(f"q must share batch, tokens and K with k, and k's H divide its heads, got {shapes}")
    if len({x.device for x in tensors.values()}) > 1 or not q.dtype == k.dtype == v.dtype:
        told = ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in tensors.items())
        raise ValueError(f"q, k, v must share a dtype, and all a device, got {told}")
    if memories.dim() != 3 or memories.shape[:2] != q.shape[:2] or memories.dtype != torch.int64:
        raise ValueError(f"memories must be int64 [B, T, n], got {memories.dtype} and {shapes}")
    if state is not None and state.dim() > 1 and state.shape[1] != k.shape[2] * k.shape[3]:
        raise ValueError(
            f"initial_state must have a state for each of {k.shape[2]} x {k.shape[3]} heads, got {list(state.shape)}"
        )
    if may_look_at(memories):
        ordered = memories.sort(-1).values
        apart = (ordered[..., 1:] > ordered[..., :-1]).all() & ((memories >= 0) & (memories < k.shape[2])).all()
        check_values(apart, lambda: f"each token must be sent to different memories below {k.shape[2]}")
