"""The decay family: what one program of each kernel computes of a chunk. `operators.py` launches them.

The mathematics is that of `lasp/kernels/portable/decay.py`. A tile is [C, D], C tokens of one chunk and D channels of
one head, and reads as 0 outside of either. Running sums of log-decays, G [C, 1] per head or [C, D] per channel, start
with each chunk. Only differences of them that are not positive are exponentiated. Tensors lie as [B, T, H, D]; `chunks`
[chunks, 3] holds each chunk's first token, its length and the state that it reads.

GATES: 0 no decay, 1 per head, 2 per channel; TRAINED: they have a gradient. STRICT: a token does not see itself (the
delta rule's keys among each other). OPERAND: the dtype of what is multiplied, PRECISION: of products of fp32 tiles;
sums are fp32 always.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sums of 64 keep their digits, and exp(-40) is far below the last digit of what the next token adds.
LOWEST = tl.constexpr(-40.0)


# Tiles --------------------------------------------------------------------------------------------------------------


@triton.jit
def at_rows(pointer, start, row, b, h, T, H: tl.constexpr, D: tl.constexpr, d):
    """Addresses of [B, T, H, D] at tokens `row` behind `start` and channels `d`. Only the first needs 64 bits."""
    first = (tl.cast(b, tl.int64) * T + start) * H + h
    return pointer + first * D + (row * (H * D))[:, None] + d[None, :]


@triton.jit
def load_rows(pointer, start, length, b, h, T, H: tl.constexpr, D: tl.constexpr, d, C: tl.constexpr):
    row = tl.arange(0, C)
    mask = (row < length)[:, None] & (d < D)[None, :]
    return tl.load(at_rows(pointer, start, row, b, h, T, H, D, d), mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, tile, start, length, b, h, T, H: tl.constexpr, D: tl.constexpr, d, C: tl.constexpr):
    row = tl.arange(0, C)
    mask = (row < length)[:, None] & (d < D)[None, :]
    tl.store(at_rows(pointer, start, row, b, h, T, H, D, d), tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def at_state(pointer, slot, b, B, h, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, k, v):
    """Addresses of [slots, B, H, K, V]."""
    head = (tl.cast(slot, tl.int64) * B + b) * H + h
    return pointer + head * (K * V) + (k * V)[:, None] + v[None, :]


@triton.jit
def load_state(pointer, slot, b, B, h, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, k, v):
    mask = (k < K)[:, None] & (v < V)[None, :]
    return tl.load(at_state(pointer, slot, b, B, h, H, K, V, k, v), mask=mask, other=0.0)


@triton.jit
def store_state(pointer, tile, slot, b, B, h, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, k, v):
    mask = (k < K)[:, None] & (v < V)[None, :]
    tl.store(at_state(pointer, slot, b, B, h, H, K, V, k, v), tile, mask=mask)


@triton.jit
def load_sums(sums, row, start, length, b, h, T, H: tl.constexpr, D: tl.constexpr, k, GATES: tl.constexpr):
    """G at tokens `row` of the chunk, [rows, 1] or [rows, D]; behind the chunk's end its last."""
    d = k if GATES == 2 else tl.arange(0, 1)
    at = at_rows(sums, start, tl.minimum(row, length - 1), b, h, T, H, D, d)
    return tl.load(at, mask=(d < D)[None, :], other=0.0)


@triton.constexpr_function
def operand(values, OPERAND):
    """The dtype in which values are multiplied: what a delta rule's tokens write is fp32, and is not rounded."""
    return tl.float32 if values.dtype.element_ty == tl.float32 else OPERAND


@triton.jit
def product(a, b, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision=PRECISION)


@triton.jit
def exact_product(a, b, PRECISION: tl.constexpr):
    """A product with an fp32 tile b: where a is bf16, with b's bf16 parts, two for tf32 and three for tf32x3.

    They keep more digits than tf32 does, and a takes half the registers.
    """
    if a.dtype == tl.bfloat16:
        part = b.to(tl.bfloat16)
        rest = b - part.to(tl.float32)
        total = tl.dot(a, part)
        part = rest.to(tl.bfloat16)
        total = tl.dot(a, part, total)
        if PRECISION == "tf32x3":
            total = tl.dot(a, (rest - part.to(tl.float32)).to(tl.bfloat16), total)
    else:
        total = product(a, b, tl.float32, PRECISION)
    return total


@triton.jit
def from_start(
    tile, sums, start, length, b, h, T, H: tl.constexpr, K: tl.constexpr, k, C: tl.constexpr, GATES: tl.constexpr
):
    """A tile decayed from the chunk's start to each token."""
    if GATES:
        D: tl.constexpr = K if GATES == 2 else 1
        tile = tile * tl.exp(load_sums(sums, tl.arange(0, C), start, length, b, h, T, H, D, k, GATES))
    return tile


@triton.jit
def to_end(
    tile, sums, start, length, b, h, T, H: tl.constexpr, K: tl.constexpr, k, C: tl.constexpr, GATES: tl.constexpr
):
    """A tile decayed from each token to the chunk's end."""
    if GATES:
        D: tl.constexpr = K if GATES == 2 else 1
        g = load_sums(sums, tl.arange(0, C), start, length, b, h, T, H, D, k, GATES)
        last = load_sums(sums, length - 1 + tl.arange(0, 1), start, length, b, h, T, H, D, k, GATES)
        tile = tile * tl.exp(tl.minimum(last - g, 0.0))
    return tile


@triton.jit
def over_chunk(state, sums, start, length, b, h, T, H: tl.constexpr, K: tl.constexpr, k, GATES: tl.constexpr):
    """A state decayed from the chunk's start to its end."""
    if GATES:
        D: tl.constexpr = K if GATES == 2 else 1
        last = load_sums(sums, length - 1 + tl.arange(0, 1), start, length, b, h, T, H, D, k, GATES)
        state = state * tl.trans(tl.exp(last))
    return state


# Inside a chunk -----------------------------------------------------------------------------------------------------


@triton.jit
def seen(C: tl.constexpr, STRICT: tl.constexpr):
    """Which keys (columns) a query (row) sees."""
    i = tl.arange(0, C)
    return (i[:, None] > i[None, :]) if STRICT else (i[:, None] >= i[None, :])


@triton.jit
def decays(sums, start, length, b, h, T, H: tl.constexpr, C: tl.constexpr, STRICT: tl.constexpr, GATES: tl.constexpr):
    """The decay from key to query [C, C] and 0 where it is not seen; the mask alone where decays are not per head."""
    decay = tl.full([C, C], 1.0, dtype=tl.float32)
    if GATES == 1:
        row = tl.arange(0, C)
        g = load_sums(sums, row, start, length, b, h, T, H, 1, row, 1)
        decay = tl.exp(tl.minimum(g - tl.trans(g), 0.0))
    return tl.where(seen(C, STRICT), decay, 0.0)


@triton.jit
def to_border(sums, g, half, start, length, b, h, T, H: tl.constexpr, D: tl.constexpr, k, C: tl.constexpr):
    """The decay between each token and the middle of its stretch of 2·half tokens, and whether it is behind it."""
    row = tl.arange(0, C)
    middle = (row | (2 * half - 1)) - half
    border = load_sums(sums, middle, start, length, b, h, T, H, D, k, 2)
    return tl.exp(-tl.abs(g - border)), ((row & half) != 0)[:, None]


@triton.jit
def same_stretch(half, C: tl.constexpr):
    stretch = tl.arange(0, C) // (2 * half)
    return stretch[:, None] == stretch[None, :]


@triton.jit
def channel_scores(
    q, k, sums, g, start, length, b, h, T, H: tl.constexpr, D: tl.constexpr, d, C: tl.constexpr,
    LEVELS: tl.constexpr, STRICT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of queries and keys decayed per channel [C, C]: queries of later halves meet keys of earlier halves of
    all stretches of 2, 4, ... C tokens, both carried to the border between (as in `scores.py`)."""
    scores = tl.zeros([C, C], dtype=tl.float32)
    for level in tl.range(0, LEVELS, num_stages=1):
        decay, later = to_border(sums, g, 1 << level, start, length, b, h, T, H, D, d, C)
        rows, columns = tl.where(later, q * decay, 0.0), tl.where(later, 0.0, k * decay)
        scores += tl.where(same_stretch(1 << level, C), product(rows, tl.trans(columns), OPERAND, PRECISION), 0.0)
    if not STRICT:
        i = tl.arange(0, C)
        diagonal = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
        scores += tl.where(i[:, None] == i[None, :], diagonal[:, None], 0.0)
    return scores


@triton.jit
def scores(
    q, k, sums, start, length, b, hq, hk, hg, T,
    HQ: tl.constexpr, HK: tl.constexpr, HG: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    LEVELS: tl.constexpr, GATES: tl.constexpr, STRICT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The decayed products of a chunk's queries and keys [C, C], without the scale."""
    total = tl.zeros([C, C], dtype=tl.float32)
    for k0 in range(0, K, BK):
        d = k0 + tl.arange(0, BK)
        q_tile = load_rows(q, start, length, b, hq, T, HQ, K, d, C)
        k_tile = load_rows(k, start, length, b, hk, T, HK, K, d, C)
        if GATES == 2:
            g = load_sums(sums, tl.arange(0, C), start, length, b, hg, T, HG, K, d, 2)
            total += channel_scores(
                q_tile, k_tile, sums, g, start, length, b, hg, T, HG, K, d, C, LEVELS, STRICT, OPERAND, PRECISION
            )
        else:
            total += product(q_tile, tl.trans(k_tile), OPERAND, PRECISION)
    if GATES != 2:
        total *= decays(sums, start, length, b, hg, T, HG, C, STRICT, GATES)
    return total


# Kernels ------------------------------------------------------------------------------------------------------------


@triton.jit
def place(D: tl.constexpr, BD: tl.constexpr):
    """The chunk of a program, and its tile of D channels. Tiles of a chunk are neighbours, and share what they read."""
    tiles: tl.constexpr = (D + BD - 1) // BD
    return tl.program_id(0) // tiles, tl.program_id(0) % tiles


@triton.jit
def sum_gates(log_decay, sums, chunks, T, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """The running sums of log-decays [B, T, H, D] within each chunk."""
    chunk, tile = place(D, BK)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    start, length = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1)
    d = tile * BK + tl.arange(0, BK)
    g = load_rows(log_decay, start, length, b, h, T, H, D, d, C).to(tl.float32)
    store_rows(sums, tl.cumsum(tl.where(g < LOWEST, LOWEST, g), 0), start, length, b, h, T, H, D, d, C)


@triton.jit
def carry(
    k, v, sums, erased, starts, states, written, ends, chunks, segments, B, T,
    HK: tl.constexpr, HV: tl.constexpr, HG: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATES: tl.constexpr, DELTA: tl.constexpr,
    VALUES: tl.constexpr, STORE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry the state through a segment of chunks: `S <- exp(G_C)·S + K''^T v`, with K'' the keys decayed to the end.

    `states` gets the state that enters each chunk, `ends` the one that leaves the segment. DELTA: v holds U, `erased`
    W, and what the tokens write is `U - W S`, which goes to `written`; without VALUES U is 0. The state's channels
    are independent but for W, which needs all of them in one tile.
    """
    across: tl.constexpr = (V + BV - 1) // BV
    segment, tile, b, h = tl.program_id(0), tl.program_id(1), tl.program_id(2) // H, tl.program_id(2) % H
    d, e = tile // across * BK + tl.arange(0, BK), tile % across * BV + tl.arange(0, BV)
    hk, hv, hg = h // (H // HK), h // (H // HV), h // (H // HG)
    # In fp32 the last product would not fit into registers beside decays per channel.
    LAST: tl.constexpr = OPERAND if GATES == 2 else operand(v, OPERAND)
    state = load_state(starts, segment, b, B, h, H, K, V, d, e)
    for chunk in range(tl.load(segments + 2 * segment), tl.load(segments + 2 * segment + 1)):
        start, length = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1)
        if STORE:
            store_state(states, state, chunk, b, B, h, H, K, V, d, e)
        values = tl.zeros([C, BV], dtype=tl.float32)
        if VALUES:
            values += load_rows(v, start, length, b, hv, T, HV, V, e, C)
        if DELTA:
            w = load_rows(erased, start, length, b, h, T, H, K, d, C)
            values = values - exact_product(w, state, PRECISION)
            if STORE:
                store_rows(written, values, start, length, b, h, T, H, V, e, C)
        keys = load_rows(k, start, length, b, hk, T, HK, K, d, C)
        keys = to_end(keys, sums, start, length, b, hg, T, HG, K, d, C, GATES)
        state = over_chunk(state, sums, start, length, b, hg, T, HG, K, d, GATES)
        state += product(tl.trans(keys), values, LAST, PRECISION)
    store_state(ends, state, segment, b, B, h, H, K, V, d, e)


@triton.jit
def carry_back(
    q, k, grad, sums, erased, grad_written, starts, states, written, ends, chunks, segments, B, T, scale,
    HQ: tl.constexpr, HK: tl.constexpr, HG: tl.constexpr, HO: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATES: tl.constexpr,
    DELTA: tl.constexpr, STORE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Carry the gradient of the state back: `dS <- exp(G_C)·dS + Q'^T do`, with Q' the queries decayed from the start.

    `states` gets the gradient of the state that leaves each chunk, `ends` that of the one that enters the segment.
    DELTA: `grad_written` holds the gradient of what tokens write as far as it comes from their chunk, du; the rest,
    `K'' dS`, is added and goes to `written`, and `dS` loses `W^T du`.
    """
    across: tl.constexpr = (V + BV - 1) // BV
    segment, tile, b, h = tl.program_id(0), tl.program_id(1), tl.program_id(2) // H, tl.program_id(2) % H
    d, e = tile // across * BK + tl.arange(0, BK), tile % across * BV + tl.arange(0, BV)
    hk, hg = h // (H // HK), h // (H // HG)
    GROUP: tl.constexpr = HO // H
    # The chain is in fp32, but for one product that would not fit into registers beside decays per channel.
    LAST: tl.constexpr = OPERAND if GATES == 2 else tl.float32
    state = load_state(starts, segment, b, B, h, H, K, V, d, e)
    first, last_chunk = tl.load(segments + 2 * segment), tl.load(segments + 2 * segment + 1)
    for step in range(last_chunk - first):
        chunk = last_chunk - 1 - step
        start, length = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1)
        if STORE:
            store_state(states, state, chunk, b, B, h, H, K, V, d, e)
        if DELTA:
            keys = load_rows(k, start, length, b, hk, T, HK, K, d, C)
            keys = to_end(keys, sums, start, length, b, hg, T, HG, K, d, C, GATES)
            du = load_rows(grad_written, start, length, b, h, T, H, V, e, C)
            du = du + product(keys, state, tl.float32, PRECISION)
            if STORE:
                store_rows(written, du, start, length, b, h, T, H, V, e, C)
        state = over_chunk(state, sums, start, length, b, hg, T, HG, K, d, GATES)
        if DELTA:
            w = load_rows(erased, start, length, b, h, T, H, K, d, C)
            state -= product(tl.trans(w), du, LAST, PRECISION)
        for member in range(GROUP):
            ho = h * GROUP + member
            queries = load_rows(q, start, length, b, ho // (HO // HQ), T, HQ, K, d, C)
            queries = from_start(queries.to(tl.float32) * scale, sums, start, length, b, hg, T, HG, K, d, C, GATES)
            do = load_rows(grad, start, length, b, ho, T, HO, V, e, C)
            state += product(tl.trans(queries), do, OPERAND, PRECISION)
    store_state(ends, state, segment, b, B, h, H, K, V, d, e)


@triton.jit
def attend(
    q, k, v, sums, states, before, output, chunks, B, T, scale,
    HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, HG: tl.constexpr, HO: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
    GATES: tl.constexpr, STRICT: tl.constexpr, INSIDE: tl.constexpr, READ: tl.constexpr, ADD: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The output: what a chunk's queries see INSIDE the chunk, what they READ from its entering state, or both.

    ADD: to what `before` holds.
    """
    chunk, tile = place(V, BV)
    b, ho = tl.program_id(1) // HO, tl.program_id(1) % HO
    h, hq = ho // (HO // H), ho // (HO // HQ)
    hk, hv, hg = h // (H // HK), h // (H // HV), h // (H // HG)
    start, length = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1)
    e = tile * BV + tl.arange(0, BV)
    total = tl.zeros([C, BV], dtype=tl.float32)
    if READ:
        slot = tl.load(chunks + 3 * chunk + 2)
        for k0 in range(0, K, BK):
            d = k0 + tl.arange(0, BK)
            queries = load_rows(q, start, length, b, hq, T, HQ, K, d, C)
            queries = from_start(queries, sums, start, length, b, hg, T, HG, K, d, C, GATES)
            total += product(queries, load_state(states, slot, b, B, h, H, K, V, d, e), OPERAND, PRECISION)
    if INSIDE:
        p = scores(
            q, k, sums, start, length, b, hq, hk, hg, T, HQ, HK, HG, K, C, BK, LEVELS, GATES, STRICT, OPERAND,
            PRECISION,
        )  # fmt: skip
        values = load_rows(v, start, length, b, hv, T, HV, V, e, C)
        total += product(p, values, operand(v, OPERAND), PRECISION)
    total *= scale
    if ADD:
        total += load_rows(before, start, length, b, ho, T, HO, V, e, C)
    store_rows(output, total, start, length, b, ho, T, HO, V, e, C)


@triton.jit
def grad_values(
    q, k, grad, sums, grad_states, dv, chunks, B, T, scale,
    HQ: tl.constexpr, HK: tl.constexpr, HG: tl.constexpr, HO: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
    GATES: tl.constexpr, INSIDE: tl.constexpr, CARRIED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of each state's values [B, T, H, V]: from INSIDE the chunk, from what is CARRIED to its end."""
    chunk, tile = place(V, BV)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    hk, hg = h // (H // HK), h // (H // HG)
    start, length = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1)
    e = tile * BV + tl.arange(0, BV)
    GROUP: tl.constexpr = HO // H
    total = tl.zeros([C, BV], dtype=tl.float32)
    if INSIDE:
        for member in range(GROUP):
            ho = h * GROUP + member
            p = scores(
                q, k, sums, start, length, b, ho // (HO // HQ), hk, hg, T, HQ, HK, HG, K, C, BK, LEVELS, GATES, False,
                OPERAND, PRECISION,
            )  # fmt: skip
            do = load_rows(grad, start, length, b, ho, T, HO, V, e, C)
            total += product(tl.trans(p), do, OPERAND, PRECISION)
        total *= scale
    if CARRIED:
        slot = tl.load(chunks + 3 * chunk + 2)
        for k0 in range(0, K, BK):
            d = k0 + tl.arange(0, BK)
            keys = load_rows(k, start, length, b, hk, T, HK, K, d, C)
            keys = to_end(keys, sums, start, length, b, hg, T, HG, K, d, C, GATES)
            dstate = load_state(grad_states, slot, b, B, h, H, K, V, d, e)
            total += product(keys, dstate, OPERAND, PRECISION)
    store_rows(dv, total, start, length, b, h, T, H, V, e, C)


@triton.jit
def grad_inside(
    q, k, dp, sums, g, start, length, b, h, T, H: tl.constexpr, D: tl.constexpr, d, C: tl.constexpr,
    LEVELS: tl.constexpr, GATES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient of what lies below the diagonal of the scores, dp [C, C], to those of q and k, [C, D] each."""
    if GATES == 2:
        dq, dk = tl.zeros_like(g), tl.zeros_like(g)
        for level in tl.range(0, LEVELS, num_stages=1):
            decay, later = to_border(sums, g, 1 << level, start, length, b, h, T, H, D, d, C)
            rows, columns = tl.where(later, q * decay, 0.0), tl.where(later, 0.0, k * decay)
            squares = tl.where(same_stretch(1 << level, C), dp, 0.0)
            dq += tl.where(later, product(squares, columns, tl.float32, PRECISION) * decay, 0.0)
            dk += tl.where(later, 0.0, product(tl.trans(squares), rows, tl.float32, PRECISION) * decay)
    else:
        ds = dp * decays(sums, start, length, b, h, T, H, C, True, GATES)
        dq, dk = product(ds, k, OPERAND, PRECISION), product(tl.trans(ds), q, OPERAND, PRECISION)
    return dq, dk


@triton.jit
def by_gate(tile, GATES: tl.constexpr):
    """A tile [C, D] summed over what shares a gate."""
    if GATES == 1:
        tile = tl.sum(tile, 1)[:, None]
    return tile


@triton.jit
def grad_keys(
    q, k, v, grad, sums, states, grad_states, dq, dk, dgates, chunks, B, T, scale,
    HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, HG: tl.constexpr, HO: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
    GATES: tl.constexpr, TRAINED: tl.constexpr, STRICT: tl.constexpr, INSIDE: tl.constexpr, READ: tl.constexpr,
    CARRIED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of queries [B, T, HO, K], and of each state's keys [B, T, H, K] and gates.

    INSIDE the chunk; of what queries READ from the entering state; of what is CARRIED to the chunk's end. A gate is
    passed by what later queries see of earlier keys, by what they read, by what earlier keys carry to the end, and by
    the state that passes the whole chunk. `dgates` is [tiles of channels, B, T, H] where gates are per head, and [B, T,
    H, K] where they are per channel.
    """
    chunk, tile = place(K, BK)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    hk, hv, hg = h // (H // HK), h // (H // HV), h // (H // HG)
    start, length = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1)
    slot = tl.load(chunks + 3 * chunk + 2)
    d = tile * BK + tl.arange(0, BK)
    i = tl.arange(0, C)
    D: tl.constexpr = K if GATES == 2 else 1
    BD: tl.constexpr = BK if GATES == 2 else 1
    GROUP: tl.constexpr = HO // H
    # As in `carry`: there is no room for more in fp32 beside decays per channel.
    SEEN: tl.constexpr = OPERAND if GATES == 2 else operand(v, OPERAND)
    k_tile = load_rows(k, start, length, b, hk, T, HK, K, d, C)
    g = tl.zeros([C, BD], dtype=tl.float32)
    if GATES:
        g = load_sums(sums, i, start, length, b, hg, T, HG, D, d, GATES)
    dk_total = tl.zeros([C, BK], dtype=tl.float32)
    later = tl.zeros([C, BD], dtype=tl.float32)
    if INSIDE or READ:
        for member in range(GROUP):
            ho = h * GROUP + member
            q_tile = load_rows(q, start, length, b, ho // (HO // HQ), T, HQ, K, d, C)
            dp = tl.zeros([C, C], dtype=tl.float32)
            dq_total = tl.zeros([C, BK], dtype=tl.float32)
            for v0 in range(0, V, BV):
                e = v0 + tl.arange(0, BV)
                do = load_rows(grad, start, length, b, ho, T, HO, V, e, C)
                if READ:
                    state = load_state(states, slot, b, B, h, H, K, V, d, e)
                    dq_total += product(do, tl.trans(state), OPERAND, PRECISION)
                if INSIDE:
                    values = load_rows(v, start, length, b, hv, T, HV, V, e, C)
                    dp += product(do, tl.trans(values), SEEN, PRECISION)
            dq_total *= scale
            if GATES:
                dq_total *= tl.exp(g)
                if TRAINED:
                    later += by_gate(q_tile * dq_total, GATES)
            if INSIDE:
                dp *= scale
                below = tl.where(seen(C, True), dp, 0.0)
                dq_below, dk_below = grad_inside(
                    q_tile, k_tile, below, sums, g, start, length, b, hg, T, HG, D, d, C, LEVELS, GATES, OPERAND,
                    PRECISION,
                )  # fmt: skip
                if TRAINED:
                    later += by_gate(q_tile * dq_below - k_tile * dk_below, GATES)
                dq_total += dq_below
                dk_total += dk_below
                if not STRICT:  # the diagonal, which passes no gate
                    own = tl.sum(tl.where(i[:, None] == i[None, :], dp, 0.0), 1)[:, None]
                    dq_total += own * k_tile
                    dk_total += own * q_tile
            store_rows(dq, dq_total, start, length, b, ho, T, HO, K, d, C)
    gates = running(later, GATES, True)
    if CARRIED:
        held, carried = tl.zeros([BK], dtype=tl.float32), tl.zeros([C, BK], dtype=tl.float32)
        for v0 in range(0, V, BV):
            e = v0 + tl.arange(0, BV)
            values = load_rows(v, start, length, b, hv, T, HV, V, e, C)
            dstate = load_state(grad_states, slot, b, B, h, H, K, V, d, e)
            carried += product(values, tl.trans(dstate), operand(v, OPERAND), PRECISION)
            if TRAINED:
                held += tl.sum(load_state(states, slot, b, B, h, H, K, V, d, e) * dstate, 1)
        carried = to_end(carried, sums, start, length, b, hg, T, HG, K, d, C, GATES)
        if TRAINED:
            kept = by_gate(k_tile * carried, GATES)
            passed = over_chunk(by_gate_of_state(held, GATES), sums, start, length, b, hg, T, HG, K, d, GATES)
            gates += running(kept, GATES, False) - kept + tl.trans(passed)
        dk_total += carried
    store_rows(dk, dk_total, start, length, b, h, T, H, K, d, C)
    if TRAINED:
        part = dgates if GATES == 2 else dgates + tl.cast(tile, tl.int64) * B * T * H
        column = d if GATES == 2 else tl.arange(0, 1)
        store_rows(part, gates, start, length, b, h, T, H, D, column, C)


@triton.jit
def running(tile, GATES: tl.constexpr, REVERSE: tl.constexpr):
    """Sums of a tile [C, 1 or D] up to each token, or from it on. Triton 3.6 cannot scan a tile of one column."""
    if GATES == 2:
        sums = tl.cumsum(tile, 0, reverse=REVERSE)
    else:
        sums = tl.cumsum(tl.sum(tile, 1), 0, reverse=REVERSE)[:, None]
    return sums


@triton.jit
def by_gate_of_state(held, GATES: tl.constexpr):
    """What the channels of a state [D] hold, summed over what shares a gate: [D or 1, 1]."""
    if GATES == 1:
        held = tl.sum(held, 0)[None]
    return held[:, None]
