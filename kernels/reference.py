"""Every recurrence token by token: the specification of lasp, and the oracle of its tests.

Slow, differentiable by autograd, and short enough to be checked against the papers by eye. Nothing here is called by
the fast path.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """`S_t = diag(exp(log_decay_t))·S_{t-1} + k_t v_t^T`, `o_t = scale·S_t^T q_t` (GLA, arXiv:2312.06635, eq. 3).

    q, k [B, T, H, K], v [B, T, H, V], each with its own number of heads; log_decay None, [H], [B, T, H] or
    [B, T, H, K]; initial_state [B or N, H, K, V]. Without `causal` every token reads the state at its document's end.
    Returns the output [B, T, H, V] and the final states [B or N, H, K, V].
    """
    gates = expand_decay(log_decay, q)
    states = max(x.shape[2] for x in (k, v, gates))
    if initial_state is not None:
        states = max(states, initial_state.shape[1])
    heads = max(states, q.shape[2])
    q, k, v, gates = (repeat_heads(x, heads) for x in (q, k, v, gates))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bounds = [0, q.shape[1]] if cu_seqlens is None else list(cu_seqlens)

    outputs, finals = [], []
    for n, (start, stop) in enumerate(pairwise(bounds)):
        state = q.new_zeros(q.shape[0], heads, q.shape[-1], v.shape[-1])
        if initial_state is not None:
            given = initial_state if cu_seqlens is None else initial_state[n : n + 1]
            state = state + repeat_heads(given, heads, dim=1)
        reads = []
        for t in range(start, stop):
            state = gates[:, t].exp().unsqueeze(-1) * state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            reads.append(state)
        outputs += [
            scale * torch.einsum("bhk,bhkv->bhv", q[:, t], read if causal else state)
            for t, read in zip(range(start, stop), reads, strict=True)
        ]
        finals.append(state[:, :: heads // states])
    output = torch.stack(outputs, 1) if outputs else v[:, :0]
    return output, torch.cat(finals)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t))·S_{t-1} + beta_t k_t v_t^T`, `o_t = scale·S_t^T q_t`.

    (Gated DeltaNet, arXiv:2412.06464, eq. 10; Kimi Linear, arXiv:2510.26692, eq. 1: first the gate, then the erasure.)
    beta [B, T, H]; log_decay None, [B, T, H] or [B, T, H, K]; all else as in `linear_attention`.
    """
    gates = expand_decay(log_decay, q)
    beta = beta.unsqueeze(-1)
    states = max(x.shape[2] for x in (k, v, gates, beta))
    if initial_state is not None:
        states = max(states, initial_state.shape[1])
    heads = max(states, q.shape[2])
    q, k, v, gates, beta = (repeat_heads(x, heads) for x in (q, k, v, gates, beta))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bounds = [0, q.shape[1]] if cu_seqlens is None else list(cu_seqlens)

    outputs, finals = [], []
    for n, (start, stop) in enumerate(pairwise(bounds)):
        state = q.new_zeros(q.shape[0], heads, q.shape[-1], v.shape[-1])
        if initial_state is not None:
            given = initial_state if cu_seqlens is None else initial_state[n : n + 1]
            state = state + repeat_heads(given, heads, dim=1)
        for t in range(start, stop):
            state = gates[:, t].exp().unsqueeze(-1) * state
            held = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
            state = state + (beta[:, t] * k[:, t]).unsqueeze(-1) * (v[:, t] - held).unsqueeze(-2)
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        finals.append(state[:, :: heads // states])
    output = torch.stack(outputs, 1) if outputs else v[:, :0]
    return output, torch.cat(finals)


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
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`S_t = (diag(exp(log_decay_t)) - erase_t read_t^T)·S_{t-1} + k_t v_t^T`, `o_t = scale·S_t^T q_t` (RWKV-7,
    arXiv:2503.14456, eq. 17).

    k, read, erase, log_decay [B, T, H, K]; v [B, T, H, V]; all else as in `linear_attention`.
    """
    states = k.shape[2]
    heads = q.shape[2]
    k, v, read, erase, log_decay = (repeat_heads(x, heads) for x in (k, v, read, erase, log_decay))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outputs, finals = [], []
    for n, (start, stop) in enumerate(pairwise([0, q.shape[1]] if cu_seqlens is None else cu_seqlens)):
        state = q.new_zeros(q.shape[0], heads, q.shape[-1], v.shape[-1])
        if initial_state is not None:
            given = initial_state if cu_seqlens is None else initial_state[n : n + 1]
            state = state + repeat_heads(given, heads, dim=1)
        for t in range(start, stop):
            found = torch.einsum("bhk,bhkv->bhv", read[:, t], state)
            state = log_decay[:, t].exp().unsqueeze(-1) * state - erase[:, t].unsqueeze(-1) * found.unsqueeze(-2)
            state = state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        finals.append(state[:, :: heads // states])
    return torch.stack(outputs, 1) if outputs else v[:, :0], torch.cat(finals)


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
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`delta_rule` in each of M memories, over the tokens that are sent to it (MoM, arXiv:2502.13685).

    memories [B, T, n], below M = num_memories; k [B, T, n, H, K], v [B, T, n, H, V], beta, log_decay [B, T, n, H]:
    of a token in each of these; initial_state [B or N, M·H, K, V]. Returns what each token reads of its memories
    [B, T, n, Hq, V] and the final states.
    """
    heads = k.shape[3]
    output, finals = v.new_zeros(*memories.shape, q.shape[2], v.shape[4]), []
    one = [(0, start, stop) for start, stop in pairwise(cu_seqlens or ())]
    for n, (row, start, stop) in enumerate(one or [(row, 0, q.shape[1]) for row in range(q.shape[0])]):
        states = []
        for memory in range(num_memories):
            at, choice = (memories[row, start:stop] == memory).nonzero(as_tuple=True)
            at = at + start
            own = [x[row, at, choice].unsqueeze(0) for x in (k, v, beta, log_decay)]
            of = slice(memory * heads, (memory + 1) * heads)
            before = None if initial_state is None else initial_state[n : n + 1, of]
            read, after = delta_rule(q[row : row + 1, at], *own, scale=scale, initial_state=before)
            output = output.index_put((torch.full_like(at, row), at, choice), read[0])
            states.append(after)
        finals.append(torch.cat(states, 1))
    return output, torch.cat(finals)


def selective_scan(
    u: Tensor,
    step: Tensor,
    rates: Tensor,
    key: Tensor,
    query: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`S_t = exp(step_t·A)·S_{t-1} + step_t·u_t·B_t`, `y_t = S_t·C_t` (Mamba, arXiv:2312.00752, eq. 2 and 4).

    u, step [B, T, I]; rates (A) [I, N]; key (B), query (C) [B, T, N]; initial_state [B or N, I, N]. Returns the output
    [B, T, I] and the final states.
    """
    outputs, finals = [], []
    for n, (start, stop) in enumerate(pairwise([0, u.shape[1]] if cu_seqlens is None else cu_seqlens)):
        state = u.new_zeros(u.shape[0], *rates.shape)
        if initial_state is not None:
            state = initial_state if cu_seqlens is None else initial_state[n : n + 1]
        for t in range(start, stop):
            decay = (step[:, t, :, None] * rates).exp()
            state = decay * state + (step[:, t] * u[:, t]).unsqueeze(-1) * key[:, t, None]
            outputs.append((state * query[:, t, None]).sum(-1))
        finals.append(state)
    return torch.stack(outputs, 1) if outputs else u[:, :0], torch.cat(finals)


def diagonal_state_space(
    u: Tensor,
    rates: Tensor,
    weights: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`S_t = exp(rates)·S_{t-1} + u_t`, `y_t = 2·Re sum_n weights_n·S_t` (S4D, arXiv:2206.11893, section 3.1).

    u [B, T, I]; rates, weights [I, N], complex; initial_state [B or N, I, N]. Returns the output [B, T, I] and the
    final states.
    """
    outputs, finals = [], []
    for n, (start, stop) in enumerate(pairwise([0, u.shape[1]] if cu_seqlens is None else cu_seqlens)):
        state = rates.new_zeros(u.shape[0], *rates.shape)
        if initial_state is not None:
            state = initial_state if cu_seqlens is None else initial_state[n : n + 1]
        for t in range(start, stop):
            state = rates.exp() * state + u[:, t].unsqueeze(-1)
            outputs.append(2 * (weights * state).sum(-1).real)
        finals.append(state)
    return torch.stack(outputs, 1) if outputs else u[:, :0], torch.cat(finals)


def slstm(
    gates: Tensor,
    recurrent: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`c_t = f c_{t-1} + i z`, `n_t = f n_{t-1} + i`, `h_t = o c_t / n_t` (xLSTM, arXiv:2405.04517, eq. 8 to 18).

    gates [B, T, 4, H, D], of z, i, f and o; recurrent [4, H, D, D]; initial_state [B or N, H, D, 4]: h, c·exp(-m),
    n·exp(-m) and m, which has no gradient. Returns the output [B, T, H, D] and the final states.
    """
    outputs, finals = [], []
    for document, (start, stop) in enumerate(pairwise([0, gates.shape[1]] if cu_seqlens is None else cu_seqlens)):
        state = gates.new_zeros(gates.shape[0], *gates.shape[3:], 4)
        if initial_state is not None:
            state = initial_state if cu_seqlens is None else initial_state[document : document + 1]
        h, c, n, m = state.unbind(-1)
        m = m.detach()
        c, n = c * m.exp(), n * m.exp()
        m = m.masked_fill(n == 0, -torch.inf)
        for t in range(start, stop):
            z, i, f, o = (gates[:, t] + torch.einsum("bhd,ghde->bghe", h, recurrent)).unbind(1)
            c, n = f.sigmoid() * c + i.exp() * z.tanh(), f.sigmoid() * n + i.exp()
            m = torch.maximum(f.sigmoid().log() + m, i).detach()
            h = o.sigmoid() * c / n
            outputs.append(h)
        finals.append(torch.stack([h, c * (-m).exp(), n * (-m).exp(), m], -1) if stop > start else state)
    return torch.stack(outputs, 1) if outputs else gates[:, :0, 0], torch.cat(finals)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """`o_t = sum_i softmax(scale·q_t·k_i)_i v_i` over the keys that t sees, with all scores written out.

    q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V]; window: a query sees itself and the window - 1 tokens before it;
    softcap c: scores become `c·tanh(scores / c)`; sinks [H]: one more score per head, whose value is 0; key_mask
    [B, T]: False hides a key. A query that sees nothing has output 0. Returns the output [B, T, H, V].
    """
    length, heads = q.shape[1], max(x.shape[2] for x in (q, k, v))
    q, k, v = (repeat_heads(x, heads) for x in (q, k, v))
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * torch.einsum("bthk,bihk->bhti", q, k)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    t, i = torch.arange(length, device=q.device).unsqueeze(1), torch.arange(length, device=q.device)
    bounds = torch.tensor([0, length] if cu_seqlens is None else list(cu_seqlens), device=q.device)
    document = torch.bucketize(i, bounds, right=True)
    seen = document.unsqueeze(1) == document
    if causal:
        seen = seen & (i <= t)
    if window is not None:
        seen = seen & (i > t - window)
    seen = seen.expand(q.shape[0], 1, length, length)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]

    # A column of a hopeless score and value 0 beside the keys keeps the softmax of a query that sees nothing finite.
    sink = scores.new_full((heads,), -1e30) if sinks is None else sinks.to(scores.dtype).clamp(min=-1e30)
    columns = torch.cat(
        [scores.masked_fill(~seen, -torch.inf), sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1
    )
    return torch.einsum("bhti,bihv->bthv", columns.softmax(-1)[..., :-1], v)


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    *,
    window: int,
    window_factor: Tensor | None = None,
    relative: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """Every token's weights for all tokens before it: `w·exp(s - m)` in the window, `phi(q)·phi(k)` for older ones; the
    output is their weighted mean of the values (LoLCATs, arXiv:2410.10254, section 3.2).

    q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V], phi_q [B, T, Hf, F], phi_k [B, T, Hg, F]; window: the token
    itself and the window - 1 before it; window_factor w [H]; m: the largest score s = scale·q·k in the window if
    `relative`, else 0; key_mask [B, T]: False gives a weight of 0. Returns the output [B, T, H, V], 0 where all weights
    are 0.
    """
    heads = max(x.shape[2] for x in (q, k, v, phi_q, phi_k))
    q, k, v, phi_q, phi_k = (repeat_heads(x, heads) for x in (q, k, v, phi_q, phi_k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    factor = q.new_ones(heads) if window_factor is None else window_factor
    shown = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if key_mask is None else key_mask

    outputs = []
    for start, stop in pairwise([0, q.shape[1]] if cu_seqlens is None else cu_seqlens):
        for t in range(start, stop):
            first = max(start, t - window + 1)
            scores = scale * torch.einsum("bhk,bihk->bhi", q[:, t], k[:, first : t + 1])
            seen = shown[:, None, first : t + 1]
            top = scores.masked_fill(~seen, -1e30).amax(-1, keepdim=True) if relative else 0
            near = factor.unsqueeze(-1) * (scores - top).masked_fill(~seen, -torch.inf).exp()
            older = torch.einsum("bhf,bihf->bhi", phi_q[:, t], phi_k[:, start:first]) * shown[:, None, start:first]
            weights = torch.cat([older, near], -1)
            total = weights.sum(-1, keepdim=True)
            mean = weights / torch.where(total == 0, 1, total)
            outputs.append(torch.einsum("bhi,bihv->bhv", mean, v[:, start : t + 1]))
    return torch.stack(outputs, 1) if outputs else v[:, :0]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`y_t = sum_i weight[:, i]·x_{t-W+1+i} + bias`, and silu of it (Mamba, arXiv:2312.00752).

    x [B, T, D], weight [D, W], bias [D]; initial_state [B or N, D, W - 1]: the tokens before the first, oldest first.
    Returns the output [B, T, D] and the last W - 1 tokens [B or N, D, W - 1].
    """
    outputs, finals = [], []
    for n, (start, stop) in enumerate(pairwise([0, x.shape[1]] if cu_seqlens is None else cu_seqlens)):
        state = x.new_zeros(x.shape[0], x.shape[2], weight.shape[1] - 1)
        if initial_state is not None:
            state = initial_state if cu_seqlens is None else initial_state[n : n + 1]
        for t in range(start, stop):
            window = torch.cat([state, x[:, t].unsqueeze(-1)], -1)
            outputs.append((window * weight).sum(-1) + (0 if bias is None else bias))
            state = window[..., 1:]
        finals.append(state)
    output = torch.stack(outputs, 1) if outputs else x[:, :0]
    return output * output.sigmoid() if activation == "silu" else output, torch.cat(finals)


def logcumsumexp(
    x: Tensor,
    *,
    exclusive: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`z_t = log(exp(z_{t-1}) + exp(x_t))`, or z_{t-1} if exclusive, behind z_0 = initial_state [B or N, ...].

    x [B, T, ...]. Returns z [B, T, ...] and the last z of each document [B or N, ...]; -inf is the logarithm of 0.
    """
    outputs, finals = [], []
    for n, (start, stop) in enumerate(pairwise([0, x.shape[1]] if cu_seqlens is None else cu_seqlens)):
        z = x.new_full((x.shape[0], *x.shape[2:]), -torch.inf)
        if initial_state is not None:
            z = initial_state if cu_seqlens is None else initial_state[n : n + 1]
        for t in range(start, stop):
            before, z = z, torch.logaddexp(z, x[:, t])
            outputs.append(before if exclusive else z)
        finals.append(z)
    return torch.stack(outputs, 1) if outputs else x[:, :0], torch.cat(finals)


def running_maximum(
    x: Tensor,
    log_decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`m_t = max(m_{t-1} + log_decay_t, x_t)` behind m_0 = initial_state [B or N, H]; x, log_decay [B, T, H].

    Returns m_{t-1} and m_t [B, T, H], and the last m of each document [B or N, H]; -inf is the maximum of nothing.
    """
    before, after, finals = [], [], []
    for n, (start, stop) in enumerate(pairwise([0, x.shape[1]] if cu_seqlens is None else cu_seqlens)):
        m = x.new_full((x.shape[0], x.shape[2]), -torch.inf)
        if initial_state is not None:
            m = initial_state if cu_seqlens is None else initial_state[n : n + 1]
        for t in range(start, stop):
            before.append(m)
            m = torch.maximum(m + log_decay[:, t], x[:, t])
            after.append(m)
        finals.append(m)
    last = torch.cat(finals)
    return (torch.stack(before, 1), torch.stack(after, 1), last) if after else (x[:, :0], x[:, :0], last)


def expand_decay(log_decay: Tensor | None, like: Tensor) -> Tensor:
    """Any kind of log-decay as [B, T, H, 1 or K]; `like` [B, T, ...] says how many tokens there are."""
    if log_decay is None:
        return like.new_zeros(like.shape[0], like.shape[1], 1, 1)
    if log_decay.dim() == 1:
        return log_decay.view(1, 1, -1, 1).expand(like.shape[0], like.shape[1], -1, 1)
    return log_decay.unsqueeze(-1) if log_decay.dim() == 3 else log_decay


def repeat_heads(x: Tensor, heads: int, dim: int = 2) -> Tensor:
    """Each head repeated until there are `heads` of them, neighbours alike."""
    return x.repeat_interleave(heads // x.shape[dim], dim)
