"""The delta rule with several memories, of which each token is sent to some (MoM, arXiv:2502.13685); and what a token
is in each of these: projections of its own, and a short convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from lasp.functional.checks import check_documents, is_packed, ranks_of
from lasp.functional.delta import delta_rule
from lasp.functional.recurrence import by_document, check_options, check_recurrence, plan_call, whole_results
from lasp.kernels.arguments import check_flags, check_integer, check_tensors
from lasp.kernels.backend import Backend, implementation
from lasp.kernels.chunks import CHUNK_SIZE
from lasp.kernels.gathered import Gathered, Rows, counts_of
from lasp.kernels.inputs import Inputs
from lasp.kernels.precision import compute_dtype
from lasp.kernels.sent import Sent, SentConvolution
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
    num_memories: int,
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

    q [B, T, Hq, K]; memories [B, T, n]: the n different memories that each token is sent to, integers below M, which is
    num_memories; k [B, T, n, H, K], v [B, T, n, H, V], beta, log_decay [B, T, n, H]: of the token in each of these. The
    rows of each memory are gathered and stand one behind the other in one call, at the arithmetic of n memories in the
    place of M. Over a group the states of all memories cross in one exchange, whatever each rank sends to them. Python
    is told how many rows each memory has: an accelerator is waited for; memories without values have as many each.
    scan="heads" takes all memories for all tokens, and so do fewer tokens than memories on one device.

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
    inputs = Inputs(q, k, v, log_decay, beta)
    together(group, "routed_delta_rule", lambda: _check_shapes(inputs, memories, num_memories, initial_state))
    few = ranks_of(group, cut) == 1 and q.shape[1] < num_memories  # in generation
    if few or scan == Heads.name or isinstance(scan, Heads):
        return _everywhere(inputs, memories, num_memories, output_final_state, options)
    batch, tokens, choices, heads = k.shape[:4]

    def check() -> Arguments:
        check_flags(output_final_state=output_final_state)
        implementation(backend, q, chunk_size, erases=True)
        said = check_options(scale, scan, chunk_size, cut.group if cut else group)
        said |= {"final_state": output_final_state, "memories": [num_memories, memories.shape[2]]}
        bounds = check_documents(q, cu_seqlens, cut)
        flat = (q[:, :, :1].expand(-1, -1, choices * heads, -1), k.flatten(2, 3), v.flatten(2, 3))
        gates = log_decay.flatten(2), beta.flatten(2)
        state = None if initial_state is None else initial_state[:, : choices * heads]
        return check_recurrence(flat, *gates, state, bounds, said, ranks_of(group, cut))

    turn, packed = begin_call(group, "routed_delta_rule", check, cut), is_packed(cu_seqlens, cut)
    plan, runs = plan_call(turn, tokens, packed)
    rows = Rows.of(memories, num_memories, runs)
    of_rows = (_taken(x.flatten(0, 2), rows.source) for x in (k, v, log_decay, beta))
    gathered = Inputs(_taken(q.flatten(0, 1), rows.source // choices), *of_rows)
    inner = implementation(backend, q, chunk_size, erases=True)(
        rows.runs,
        heads,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=True,
        chunk_size=chunk_size or CHUNK_SIZE,
    )
    call = Call(Gathered.around(inner, batch, len(runs)), plan, turn, check_scan(scan), output_final_state)
    state = by_document(initial_state, num_memories * heads, packed, compute_dtype(q))
    output, final = causal_recurrence(call, state, gathered)
    return whole_results(
        _taken(output[0], rows.place.flatten()).view(*memories.shape, *output.shape[2:]), final, packed
    )


@outside
def routed_linear(x: Tensor, weight: Tensor, memories: Tensor) -> Tensor:
    """`weight_m·x` in the memories that each token is sent to, at the arithmetic of those alone. x [B, T, I], weight
    [M, O, I], memories [B, T, n]; returns [B, T, n, O]. Nothing crosses ranks; an accelerator is waited for,
    but for fewer tokens than memories."""
    if x.shape[1] < len(weight):  # in generation
        every = linear(x, weight.flatten(0, 1)).unflatten(2, weight.shape[:2])
        return every.take_along_dim(memories.unsqueeze(-1), 2)
    order, counts = memories.flatten().argsort(stable=True), counts_of(memories.flatten(), len(weight))
    rows = x.flatten(0, 1).index_select(0, order // memories.shape[2]).split(counts)
    found = torch.cat([linear(own, of_memory) for own, of_memory in zip(rows, weight, strict=True)])
    return found.index_select(0, order.argsort()).view(*memories.shape, -1)


class Routed(NamedTuple):
    """Tokens x [B, T, n, C], each as it is in the n memories that it is sent to; memories [B, T, n], as in
    `routed_delta_rule`; mask [B, T] bool: False tokens are not there."""

    x: Tensor
    memories: Tensor
    mask: Tensor | None = None


@outside
def routed_conv1d(
    tokens: Routed,
    weight: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    group: SequenceGroup | None = None,
    cut: Cut | None = None,
    scan: ScanName | Scan = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d` in each of M memories, over the tokens that are sent to it, one after another.

    weight [M, C, W], of at least two taps. initial_state: the last W - 1 tokens of each memory, oldest first,
    [B or documents, M, W - 1, C]; 0 if None. Over a group these cross in one exchange.

    Returns the output [B, T, n, C], 0 where a token is not there, and where asked the final states.
    """
    x, memories, mask = tokens

    def check() -> Arguments:
        check_flags(output_final_state=output_final_state)
        said = check_options(None, scan, None, cut.group if cut else group) | {"final_state": output_final_state}
        return _check_convolution(tokens, weight, initial_state, lambda: check_documents(x, cu_seqlens, cut), said)

    turn, packed = begin_call(group, "routed_conv1d", check, cut), is_packed(cu_seqlens, cut)
    plan, runs = plan_call(turn, x.shape[1], packed)
    count = len(weight)
    if mask is not None:  # what is not there goes to a memory of its own, which makes nothing of it
        memories = memories.masked_fill(~mask.unsqueeze(-1), count)
        weight = pad(weight, (0, 0, 0, 0, 0, 1))
        initial_state = None if initial_state is None else pad(initial_state, (0, 0, 0, 0, 0, 1))
    sent = Rows.of(memories, len(weight), runs)
    convolution = SentConvolution(sent.runs, len(weight), 1.0, causal=True, chunk_size=x.shape[1], batch=len(x))
    call = Call(convolution, plan, turn, check_scan(scan), output_final_state)
    state = by_document(initial_state, len(weight), packed, compute_dtype(x))
    output, ends = causal_recurrence(call, state, Sent(_taken(x.flatten(0, 2), sent.source), weight))
    ends = None if ends is None else ends[:, :, :count]
    return whole_results(_taken(output[0], sent.place.flatten()).view_as(x), ends, packed)


def _check_convolution(
    tokens: Routed,
    weight: Tensor,
    state: Tensor | None,
    documents: Callable[[], tuple[int, ...] | None],
    said: dict[str, Any],
) -> Arguments:
    """What ranks tell one another of `routed_conv1d`. documents: their bounds; said: of the options."""
    x, memories, mask = tokens
    given = {"x": x, "weight": weight, "memories": memories, "mask": mask, "initial_state": state}
    check_tensors(("mask", "initial_state"), **given)
    told = f"x {list(x.shape)} on {x.device}, weight {list(weight.shape)} on {weight.device}"
    if x.dim() != 4 or weight.dim() != 3 or weight.shape[1] != x.shape[3] or weight.shape[2] < 2:
        raise ValueError(f"x must be [B, T, n, C] and weight [M, C, W] of at least two taps, got {told}")
    if len({t.device for t in given.values() if t is not None}) > 1:
        raise ValueError(f"x, weight, memories, mask and initial_state must share a device, got {told}")
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {list(x.shape[:2])}, got {mask.dtype} {list(mask.shape)}")
    _check_memories(memories, x, len(weight))
    bounds = documents()
    batch, length, choices, channels = x.shape
    wanted = [batch if bounds is None else len(bounds) - 1, len(weight), weight.shape[2] - 1, channels]
    if state is not None and list(state.shape) != wanted:
        raise ValueError(f"initial_state must be {wanted}, got {list(state.shape)}")
    fields = said | {
        "device": x.device.type,
        "shape": [batch, choices, *weight.shape],
        "dtype": str(x.dtype),
        "initial_state": state is not None,
        "mask": mask is not None,
        "backward": torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, state)),
    }
    return Arguments(fields, length, bounds)


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """Rows [1, R, ...] of x."""
    return x.index_select(0, index).unsqueeze(0)


def _everywhere(
    inputs: Inputs, memories: Tensor, count: int, output_final_state: bool, options: dict[str, Any]
) -> Tensor | tuple[Tensor, Tensor]:
    """The same with all memories as heads, in which a token erases, writes and decays nothing where it is not sent."""
    q, *sent = inputs
    k, v, log_decay, beta = (_spread(x, memories, count).flatten(2, 3) for x in sent if x is not None)
    result = delta_rule(
        q.repeat(1, 1, count, 1), k, v, beta, log_decay,
        output_final_state=output_final_state, **options,
    )  # fmt: skip
    output, final = result if isinstance(result, tuple) else (result, None)
    output = output.unflatten(2, (count, -1)).take_along_dim(memories[..., None, None], 2)
    return output if final is None else (output, final)


def _spread(x: Tensor, memories: Tensor, count: int) -> Tensor:
    """[B, T, n, ...] as [B, T, memories, ...], 0 where a token is not sent."""
    index = memories.view(*memories.shape, *(1,) * (x.dim() - 3)).expand_as(x)
    return x.new_zeros(*x.shape[:2], count, *x.shape[3:]).scatter(2, index, x)


def _check_shapes(inputs: Inputs, memories: Tensor, count: int, state: Tensor | None) -> None:
    q, k, v, log_decay, beta = inputs
    given = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay, "memories": memories}
    tensors = {name: x for name, x in given.items() if x is not None}
    check_tensors(("initial_state",), **given, initial_state=state)
    assert beta is not None, "checked"
    assert log_decay is not None, "checked"
    check_integer("num_memories", count, 1)
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
    if (
        q.dim() != 4
        or k.dim() != 5
        or v.dim() != 5
        or {k.shape[:4], v.shape[:4], beta.shape, log_decay.shape} != {k.shape[:4]}
    ):
        raise ValueError(f"k, v, beta and log_decay must be [B, T, n, H, ...] beside q [B, T, Hq, K], got {shapes}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[4] or q.shape[2] % k.shape[3]:
        raise ValueError(f"q must share batch, tokens and K with k, and k's H divide its heads, got {shapes}")
    if len({x.device for x in tensors.values()}) > 1 or not q.dtype == k.dtype == v.dtype:
        told = ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in tensors.items())
        raise ValueError(f"q, k, v must share a dtype, and all a device, got {told}")
    _check_memories(memories, k, count)
    if state is not None and (state.dim() != 4 or state.shape[1] != count * k.shape[3]):
        raise ValueError(
            f"initial_state must have a state for each of {count} x {k.shape[3]} heads, got {list(state.shape)}"
        )


def _check_memories(memories: Tensor, beside: Tensor, count: int) -> None:
    """Raises ValueError for what is no choice of memories below `count` for the tokens of `beside` [B, T, n, ...]."""
    if memories.shape != beside.shape[:3] or memories.dtype != torch.int64:
        wanted, told = list(beside.shape[:3]), f"{memories.dtype} {list(memories.shape)}"
        raise ValueError(f"memories must be int64 [B, T, n] = {wanted}, got {told}")
    if may_look_at(memories):
        ordered = memories.sort(-1).values
        apart = (ordered[..., 1:] > ordered[..., :-1]).all() & ((memories >= 0) & (memories < count)).all()
        check_values(apart, lambda: f"each token must be sent to different memories below {count}")
