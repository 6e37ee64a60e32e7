"""Softmax attention over the near tokens and linear attention over the older ones, under one normaliser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from lasp.functional.checks import check_documents, check_tokens, ranks_of
from lasp.functional.hybrid_arguments import HybridOptions, HybridState, check_hybrid, check_state
from lasp.functional.linear import linear_attention
from lasp.functional.recurrence import check_options, check_recurrence
from lasp.kernels.arguments import check_flags, check_integer, check_tensors
from lasp.kernels.backend import Backend, implementation
from lasp.kernels.precision import compute_dtype, exact
from lasp.kernels.softmax.mask import Mask
from lasp.kernels.softmax.window import Sight, Windowed, window_attention
from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.halo import Halo, bring_halo
from lasp.parallel.layout import Plan
from lasp.parallel.scan import Scan, ScanName
from lasp.parallel.untraced import outside
from lasp.parallel.work import count_attention


@overload
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    *,
    window: int,
    output_final_state: Literal[False] = False,
    **options: Unpack[HybridOptions],
) -> Tensor: ...
@overload
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    *,
    window: int,
    output_final_state: Literal[True],
    **options: Unpack[HybridOptions],
) -> tuple[Tensor, HybridState]: ...
@overload
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    *,
    window: int,
    output_final_state: bool,
    **options: Unpack[HybridOptions],
) -> Tensor | tuple[Tensor, HybridState]: ...
@outside  # tables of integers and messages
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
    initial_state: HybridState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    group: SequenceGroup | None = None,
    cut: Cut | None = None,
    scan: ScanName | Scan = "auto",
    backend: Backend = "auto",
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, HybridState]:
    """Softmax attention over a window, linear attention over all before it, one normaliser (LoLCATs, arXiv:2410.10254).

        o_t = (w·sum_near exp(s_ti - m_t) v_i + sum_older phi(q_t)·phi(k_i) v_i) / (the same sums without v_i)

    with s_ti = scale·q_t·k_i; near are token t and the window - 1 tokens before it in its document, older all before
    those. Over a group the window's keys and values cross to the ranks that see them, and states for all others.

    q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V], of one dtype; phi_q [B, T, Hf, F] and phi_k [B, T, Hg, F], the
    features, of any floating dtype, with products that are not negative. Each may have its own number of heads if every
    count divides the next larger. Without a group T is the whole sequence; with one, these and key_mask are this rank's
    tokens, and everything else speaks of the whole sequence.

    window: at least 1. window_factor: w, [H] and positive, H the largest number of heads; 1 if None. relative:
    m_t is the largest score in the window, as in LoLCATs; False: m_t = 0, for features whose products stand for
    exp(s_ti) (Taylor's, arXiv:2402.18668). scale: K**-0.5 by default. key_mask [B, T]: False hides a key.
    initial_state: what `output_final_state` returned for the tokens before these, of one text on one device.
    cu_seqlens, cut, scan, backend, chunk_size: as in `linear_attention`.

    Returns the output [B, T, H, V] in v's dtype, 0 where a token sees nothing; with output_final_state also the
    `HybridState` after the last token. Differentiable in q, k, v, phi_q, phi_k, window_factor and the states, once.
    Raises ValueError, on every rank of the group, for arguments that do not fit.
    """
    features = (phi_q, phi_k)

    def check() -> Arguments:
        check_flags(relative=relative, output_final_state=output_final_state)
        check_integer("window", window, 1)
        check_tensors(("key_mask",), key_mask=key_mask)
        check_tokens(q, k, v)
        bounds = check_documents(q, cu_seqlens, cut)
        ranks = ranks_of(group, cut)
        check_state((q, k, v), features, window, initial_state, output_final_state, ranks > 1 or bounds is not None)
        options = check_options(scale, scan, chunk_size, cut.group if cut else group)
        options |= {"window": window, "relative": relative, "final_state": output_final_state}
        fields = check_hybrid((q, k, v), features, window_factor, key_mask, options)
        linear = _linear_inputs(features, v)
        memory = None if initial_state is None else initial_state.memory
        fields |= check_recurrence(linear, None, None, memory, bounds, options, ranks).fields
        implementation(backend, linear[0], chunk_size)
        tensors = (q, k, v, phi_q, phi_k, window_factor)
        wanted = [isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled() for x in tensors]
        return Arguments(fields | {"backward": wanted}, q.shape[1], bounds)

    turn = begin_call(group, "hybrid_attention", check, cut)
    lies = turn()
    if initial_state is None and not output_final_state:
        window = min(window, max(lies.total, 1))
    count_attention(Mask(lies.bounds or (0, lies.total), True, window), lies.size, q, v)
    halo = Halo.of(turn, window)
    with exact(q):
        shown = q.new_ones(q.shape[:2]) if key_mask is None else key_mask
        stretches = _stretches(halo, HybridTokens(k, v, phi_k, shown), initial_state)
        reach = lies.positions(q.device) + (0 if initial_state is None else window)
        near = _near(q, stretches, reach, window, q.shape[-1] ** -0.5 if scale is None else float(scale))
        older_k, older_v = _older(stretches, reach, window, compute_dtype(q))
        far = linear_attention(
            phi_q.to(older_v.dtype),
            older_k,
            older_v,
            scale=1.0,
            initial_state=None if initial_state is None else initial_state.memory,
            output_final_state=output_final_state,
            cut=lies,
            scan=scan,
            backend=backend,
            chunk_size=chunk_size,
        )
        far, memory = far if isinstance(far, tuple) else (far, None)
        output = _joined(near, far, window_factor, relative).to(v.dtype)
    if memory is None:
        return output
    ((_, last),) = stretches
    k, v, phi_k, shown = (x[:, x.shape[1] - window :] for x in last)
    return output, HybridState(memory, k, v, phi_k, shown > 0.5)


class HybridTokens(NamedTuple):
    """What a later token may see, of consecutive tokens."""

    k: Tensor  # [B, N, Hk, K]
    v: Tensor  # [B, N, Hv, V]
    phi_k: Tensor  # [B, N, Hf, F]
    shown: Tensor  # [B, N], 1 or 0


Stretches = list[tuple[slice, HybridTokens]]


def _stretches(halo: Halo, own: HybridTokens, state: HybridState | None) -> Stretches:
    """Of every piece of this rank where it lies, and its tokens behind the `halo.size` tokens ahead of them; those that
    are not there are not shown."""
    # The halo travels in one dtype, the widest of them: no feature is rounded.
    dtype = torch.promote_types(own.k.dtype, own.phi_k.dtype)
    initial = [None] * 4 if state is None else [x.to(dtype).unsqueeze(0) for x in state[1:]]
    tokens, ahead = bring_halo(halo, [x.to(dtype) for x in own], initial)
    kinds = [x.dtype for x in own]
    return [
        (
            rows,
            HybridTokens(
                *(
                    torch.cat([before[first], x[:, rows]], 1).to(kind)
                    for before, x, kind in zip(ahead, tokens, kinds, strict=True)
                )
            ),
        )
        for first, rows in _pieces(halo.plan)
    ]


def _pieces(plan: Plan) -> Iterator[tuple[int, slice]]:
    """Of every piece of this rank its first run, and its local tokens."""
    for _, runs in groupby(enumerate(plan.runs), lambda run: run[1].order):
        (first, run), *others = runs
        last = others[-1][1] if others else run
        yield first, slice(run.offset, last.offset + last.length)


def _near(q: Tensor, stretches: Stretches, reach: Tensor, window: int, scale: float) -> Windowed:
    """The attention of all queries over their windows. reach [T]: tokens ahead of each in its document."""
    parts = []
    for rows, (k, v, _, shown) in stretches:
        heads = max(k.shape[2], v.shape[2])
        own, k, v = (_with_heads(x, n) for x, n in ((q[:, rows], max(q.shape[2], heads)), (k, heads), (v, heads)))
        sight = Sight(shown[:, 1:] > 0.5, reach[rows])
        parts.append(window_attention(own, k[:, 1:], v[:, 1:], sight, window, scale))
    return Windowed(*(torch.cat(x, 1) for x in zip(*parts, strict=True)))


def _older(stretches: Stretches, reach: Tensor, window: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The features of keys, and the values with a column of ones, that leave each token's window: those of the token
    `window` before it, 0 where there is none in its document or it is hidden."""
    keys, values = [], []
    for rows, (_, v, phi_k, shown) in stretches:
        tokens = rows.stop - rows.start
        seen = (shown[:, :tokens] > 0.5) & (reach[rows] >= window)
        keys.append(phi_k[:, :tokens].to(dtype).masked_fill(~seen[..., None, None], 0))
        values.append(pad(v[:, :tokens].to(dtype), (0, 1), value=1.0))
    return torch.cat(keys, 1), torch.cat(values, 1)


def _joined(near: Windowed, far: Tensor, factor: Tensor | None, relative: bool) -> Tensor:
    """Both under one normaliser [B, T, H, V]. far [B, T, h, V + 1]: its sums, the last of them without values."""
    heads = max(near.output.shape[2], far.shape[2])
    (output, lse, top), far = (_with_heads(x, heads) for x in near), _with_heads(far, heads)
    # The window's sums count exp(lse - anchor): both parts are divided by the larger of that and 1.
    anchor = top.masked_fill(top == -torch.inf, 0) if relative else torch.zeros_like(top)
    unit = torch.maximum(lse, anchor).detach()
    share = (lse - unit).exp().unsqueeze(-1)
    if factor is not None:
        share = share * factor.to(share.dtype).unsqueeze(-1)
    far = far * (anchor - unit).exp().unsqueeze(-1)
    total = share + far[..., -1:]
    return (share * output + far[..., :-1]) / total.masked_fill(total == 0, 1)


def _with_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, h, ...] with each head repeated until there are `heads`."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def _linear_inputs(features: tuple[Tensor, Tensor], v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with the normaliser's column, in the compute dtype."""
    dtype = compute_dtype(v)
    phi_q, phi_k = (x.to(dtype) for x in features)
    return phi_q, phi_k, v.new_empty((), dtype=dtype).expand(*v.shape[:3], v.shape[3] + 1)
