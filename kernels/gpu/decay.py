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

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Sums of 64 keep their digits, and exp(-40) is far below the last digit of what the next token adds.
LOWEST = tl.constexpr(-40.0)


# Where things are ---------------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """A chunk: its first token, its length, in which sequence it is, and of how many tokens those are."""

    start: Any
    length: Any
    b: Any
    T: Any


class Rows(NamedTuple):
    """One head of a tensor [B, T, H, D]."""

    pointer: Any
    h: Any
    H: Any
    D: Any


class States(NamedTuple):
    """One head of states [slots, B, H, K, V]."""

    pointer: Any
    B: Any
    h: Any
    H: Any
    K: Any
    V: Any


class Form(NamedTuple):
    """What is known of a chunk's scores when they are compiled. It stays known only where it is built in the call."""

    C: tl.constexpr
    K: tl.constexpr
    BK: tl.constexpr
    GATES: tl.constexpr
    OPERAND: tl.constexpr
    PRECISION: tl.constexpr


@triton.jit
def locate(chunks, chunk, b, T):
    """A chunk by its number."""
    return Chunk(tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1), b, T)


@triton.jit
def place(D: tl.constexpr, BD: tl.constexpr):
    """The chunk of a program, and its tile of D channels. Tiles of a chunk are neighbours, and share what they read."""
    tiles: tl.constexpr = (D + BD - 1) // BD
    return tl.program_id(0) // tiles, tl.program_id(0) % tiles


# Tiles --------------------------------------------------------------------------------------------------------------


@triton.jit
def at_rows(x, at, row, d):
    """Addresses of tokens `row` behind the chunk's start and channels `d`. Only the first needs 64 bits."""
    first = (tl.cast(at.b, tl.int64) * at.T + at.start) * x.H + x.h
    return x.pointer + first * x.D + (row * (x.H * x.D))[:, None] + d[None, :]


@triton.jit
def load_rows(x, at, d, C: tl.constexpr):
    row = tl.arange(0, C)
    mask = (row < at.length)[:, None] & (d < x.D)[None, :]
    return tl.load(at_rows(x, at, row, d), mask=mask, other=0.0)


@triton.jit
def store_rows(x, tile, at, d, C: tl.constexpr):
    row = tl.arange(0, C)
    mask = (row < at.length)[:, None] & (d < x.D)[None, :]
    tl.store(at_rows(x, at, row, d), tile.to(x.pointer.dtype.element_ty), mask=mask)


@triton.jit
def at_state(states, slot, b, k, v):
    head = (tl.cast(slot, tl.int64) * states.B + b) * states.H + states.h
    return states.pointer + head * (states.K * states.V) + (k * states.V)[:, None] + v[None, :]


@triton.jit
def load_state(states, slot, b, k, v):
    mask = (k < states.K)[:, None] & (v < states.V)[None, :]
    return tl.load(at_state(states, slot, b, k, v), mask=mask, other=0.0)


@triton.jit
def store_state(states, tile, slot, b, k, v):
    mask = (k < states.K)[:, None] & (v < states.V)[None, :]
    tl.store(at_state(states, slot, b, k, v), tile, mask=mask)


@triton.jit
def load_sums(sums, at, row, k, GATES: tl.constexpr):
    """G at tokens `row` of the chunk, [rows, 1] or [rows, D]; behind the chunk's end its last."""
    d = k if GATES == 2 else tl.arange(0, 1)
    address = at_rows(sums, at, tl.minimum(row, at.length - 1), d)
    return tl.load(address, mask=(d < sums.D)[None, :], other=0.0)


@triton.constexpr_function
def levels(size):
    """How often a size can be halved."""
    return int(size).bit_length() - 1


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
def from_start(tile, sums, at, k, C: tl.constexpr, GATES: tl.constexpr):
    """A tile decayed from the chunk's start to each token."""
    if GATES:
        tile = tile * tl.exp(load_sums(sums, at, tl.arange(0, C), k, GATES))
    return tile


@triton.jit
def to_end(tile, sums, at, k, C: tl.constexpr, GATES: tl.constexpr):
    """A tile decayed from each token to the chunk's end."""
    if GATES:
        g = load_sums(sums, at, tl.arange(0, C), k, GATES)
        last = load_sums(sums, at, at.length - 1 + tl.arange(0, 1), k, GATES)
        tile = tile * tl.exp(tl.minimum(last - g, 0.0))
    return tile


@triton.jit
def over_chunk(state, sums, at, k, GATES: tl.constexpr):
    """A state decayed from the chunk's start to its end."""
    if GATES:
        last = load_sums(sums, at, at.length - 1 + tl.arange(0, 1), k, GATES)
        state = state * tl.trans(tl.exp(last))
    return state


# Inside a chunk -----------------------------------------------------------------------------------------------------


@triton.jit
def seen(C: tl.constexpr, STRICT: tl.constexpr):
    """Which keys (columns) a query (row) sees."""
    i = tl.arange(0, C)
    return (i[:, None] > i[None, :]) if STRICT else (i[:, None] >= i[None, :])


@triton.jit
def decays(sums, at, C: tl.constexpr, GATES: tl.constexpr, STRICT: tl.constexpr):
    """The decay from key to query [C, C] and 0 where it is not seen; the mask alone where decays are not per head."""
    decay = tl.full([C, C], 1.0, dtype=tl.float32)
    if GATES == 1:
        row = tl.arange(0, C)
        g = load_sums(sums, at, row, row, 1)
        decay = tl.exp(tl.minimum(g - tl.trans(g), 0.0))
    return tl.where(seen(C, STRICT), decay, 0.0)


@triton.jit
def to_border(sums, at, g, half, k, C: tl.constexpr):
    """The decay between each token and the middle of its stretch of 2·half tokens, and whether it is behind it."""
    row = tl.arange(0, C)
    middle = (row | (2 * half - 1)) - half
    border = load_sums(sums, at, middle, k, 2)
    return tl.exp(-tl.abs(g - border)), ((row & half) != 0)[:, None]


@triton.jit
def same_stretch(half, C: tl.constexpr):
    stretch = tl.arange(0, C) // (2 * half)
    return stretch[:, None] == stretch[None, :]


@triton.jit
def channel_scores(q, k, sums, at, d, form, STRICT: tl.constexpr):
    """Products of queries and keys decayed per channel [C, C]: queries of later halves meet keys of earlier halves of
    all stretches of 2, 4, ... C tokens, both carried to the border between (as in `scores.py`)."""
    g = load_sums(sums, at, tl.arange(0, form.C), d, 2)
    scores = tl.zeros([form.C, form.C], dtype=tl.float32)
    for level in tl.range(0, levels(form.C), num_stages=1):
        decay, later = to_border(sums, at, g, 1 << level, d, form.C)
        rows, columns = tl.where(later, q * decay, 0.0), tl.where(later, 0.0, k * decay)
        squares = product(rows, tl.trans(columns), form.OPERAND, form.PRECISION)
        scores += tl.where(same_stretch(1 << level, form.C), squares, 0.0)
    if not STRICT:
        i = tl.arange(0, form.C)
        diagonal = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
        scores += tl.where(i[:, None] == i[None, :], diagonal[:, None], 0.0)
    return scores


@triton.jit
def scores(q, k, sums, at, form, STRICT: tl.constexpr):
    """The decayed products of a chunk's queries and keys [C, C], without the scale."""
    total = tl.zeros([form.C, form.C], dtype=tl.float32)
    for k0 in range(0, form.K, form.BK):
        d = k0 + tl.arange(0, form.BK)
        q_tile, k_tile = load_rows(q, at, d, form.C), load_rows(k, at, d, form.C)
        if form.GATES == 2:
            total += channel_scores(q_tile, k_tile, sums, at, d, form, STRICT)
        else:
            total += product(q_tile, tl.trans(k_tile), form.OPERAND, form.PRECISION)
    if form.GATES != 2:
        total *= decays(sums, at, form.C, form.GATES, STRICT)
    return total


# Kernels ------------------------------------------------------------------------------------------------------------


@triton.jit
def sum_gates(log_decay, sums, chunks, T, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """The running sums of log-decays [B, T, H, D] within each chunk."""
    chunk, tile = place(D, BK)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    at, d = locate(chunks, chunk, b, T), tile * BK + tl.arange(0, BK)
    g = load_rows(Rows(log_decay, h, H, D), at, d, C).to(tl.float32)
    store_rows(Rows(sums, h, H, D), tl.cumsum(tl.where(g < LOWEST, LOWEST, g), 0), at, d, C)


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
    gates = Rows(sums, h // (H // HG), HG, K if GATES == 2 else 1)
    # In fp32 the last product would not fit into registers beside decays per channel.
    LAST: tl.constexpr = OPERAND if GATES == 2 else operand(v, OPERAND)
    state = load_state(States(starts, B, h, H, K, V), segment, b, d, e)
    for chunk in range(tl.load(segments + 2 * segment), tl.load(segments + 2 * segment + 1)):
        at = locate(chunks, chunk, b, T)
        if STORE:
            store_state(States(states, B, h, H, K, V), state, chunk, b, d, e)
        values = tl.zeros([C, BV], dtype=tl.float32)
        if VALUES:
            values += load_rows(Rows(v, h // (H // HV), HV, V), at, e, C)
        if DELTA:
            values = values - exact_product(load_rows(Rows(erased, h, H, K), at, d, C), state, PRECISION)
            if STORE:
                store_rows(Rows(written, h, H, V), values, at, e, C)
        keys = to_end(load_rows(Rows(k, h // (H // HK), HK, K), at, d, C), gates, at, d, C, GATES)
        state = over_chunk(state, gates, at, d, GATES)
        state += product(tl.trans(keys), values, LAST, PRECISION)
    store_state(States(ends, B, h, H, K, V), state, segment, b, d, e)


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
    gates = Rows(sums, h // (H // HG), HG, K if GATES == 2 else 1)
    GROUP: tl.constexpr = HO // H
    # The chain is in fp32, but for one product that would not fit into registers beside decays per channel.
    LAST: tl.constexpr = OPERAND if GATES == 2 else tl.float32
    state = load_state(States(starts, B, h, H, K, V), segment, b, d, e)
    first, last_chunk = tl.load(segments + 2 * segment), tl.load(segments + 2 * segment + 1)
    for step in range(last_chunk - first):
        chunk = last_chunk - 1 - step
        at = locate(chunks, chunk, b, T)
        if STORE:
            store_state(States(states, B, h, H, K, V), state, chunk, b, d, e)
        if DELTA:
            keys = to_end(load_rows(Rows(k, h // (H // HK), HK, K), at, d, C), gates, at, d, C, GATES)
            du = load_rows(Rows(grad_written, h, H, V), at, e, C)
            du = du + product(keys, state, tl.float32, PRECISION)
            if STORE:
                store_rows(Rows(written, h, H, V), du, at, e, C)
        state = over_chunk(state, gates, at, d, GATES)
        if DELTA:
            w = load_rows(Rows(erased, h, H, K), at, d, C)
            state -= product(tl.trans(w), du, LAST, PRECISION)
        for member in range(GROUP):
            ho = h * GROUP + member
            queries = load_rows(Rows(q, ho // (HO // HQ), HQ, K), at, d, C)
            queries = from_start(queries.to(tl.float32) * scale, gates, at, d, C, GATES)
            do = load_rows(Rows(grad, ho, HO, V), at, e, C)
            state += product(tl.trans(queries), do, OPERAND, PRECISION)
    store_state(States(ends, B, h, H, K, V), state, segment, b, d, e)


@triton.jit
def attend(
    q, k, v, sums, states, before, output, chunks, B, T, scale,
    HQ: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, HG: tl.constexpr, HO: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATES: tl.constexpr, STRICT: tl.constexpr, INSIDE: tl.constexpr, READ: tl.constexpr, ADD: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The output: what a chunk's queries see INSIDE the chunk, what they READ from its entering state, or both.

    ADD: to what `before` holds.
    """
    chunk, tile = place(V, BV)
    b, ho = tl.program_id(1) // HO, tl.program_id(1) % HO
    h = ho // (HO // H)
    at = locate(chunks, chunk, b, T)
    e = tile * BV + tl.arange(0, BV)
    queries = Rows(q, ho // (HO // HQ), HQ, K)
    gates = Rows(sums, h // (H // HG), HG, K if GATES == 2 else 1)
    total = tl.zeros([C, BV], dtype=tl.float32)
    if READ:
        slot = tl.load(chunks + 3 * chunk + 2)
        for k0 in range(0, K, BK):
            d = k0 + tl.arange(0, BK)
            state = load_state(States(states, B, h, H, K, V), slot, b, d, e)
            total += product(
                from_start(load_rows(queries, at, d, C), gates, at, d, C, GATES), state, OPERAND, PRECISION
            )
    if INSIDE:
        keys, values = Rows(k, h // (H // HK), HK, K), Rows(v, h // (H // HV), HV, V)
        p = scores(queries, keys, gates, at, Form(C, K, BK, GATES, OPERAND, PRECISION), STRICT)
        total += product(p, load_rows(values, at, e, C), operand(v, OPERAND), PRECISION)
    total *= scale
    if ADD:
        total += load_rows(Rows(before, ho, HO, V), at, e, C)
    store_rows(Rows(output, ho, HO, V), total, at, e, C)


@triton.jit
def grad_values(
    q, k, grad, sums, grad_states, dv, chunks, B, T, scale,
    HQ: tl.constexpr, HK: tl.constexpr, HG: tl.constexpr, HO: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATES: tl.constexpr, INSIDE: tl.constexpr, CARRIED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of each state's values [B, T, H, V]: from INSIDE the chunk, from what is CARRIED to its end."""
    chunk, tile = place(V, BV)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    at = locate(chunks, chunk, b, T)
    e = tile * BV + tl.arange(0, BV)
    keys = Rows(k, h // (H // HK), HK, K)
    gates = Rows(sums, h // (H // HG), HG, K if GATES == 2 else 1)
    GROUP: tl.constexpr = HO // H
    total = tl.zeros([C, BV], dtype=tl.float32)
    if INSIDE:
        for member in range(GROUP):
            ho = h * GROUP + member
            queries = Rows(q, ho // (HO // HQ), HQ, K)
            p = scores(queries, keys, gates, at, Form(C, K, BK, GATES, OPERAND, PRECISION), False)
            total += product(tl.trans(p), load_rows(Rows(grad, ho, HO, V), at, e, C), OPERAND, PRECISION)
        total *= scale
    if CARRIED:
        slot = tl.load(chunks + 3 * chunk + 2)
        for k0 in range(0, K, BK):
            d = k0 + tl.arange(0, BK)
            dstate = load_state(States(grad_states, B, h, H, K, V), slot, b, d, e)
            total += product(to_end(load_rows(keys, at, d, C), gates, at, d, C, GATES), dstate, OPERAND, PRECISION)
    store_rows(Rows(dv, h, H, V), total, at, e, C)


@triton.jit
def grad_inside(q, k, dp, sums, at, g, d, form):
    """From the gradient of what lies below the diagonal of the scores, dp [C, C], to those of q and k, [C, D] each."""
    if form.GATES == 2:
        dq, dk = tl.zeros_like(g), tl.zeros_like(g)
        for level in tl.range(0, levels(form.C), num_stages=1):
            decay, later = to_border(sums, at, g, 1 << level, d, form.C)
            rows, columns = tl.where(later, q * decay, 0.0), tl.where(later, 0.0, k * decay)
            squares = tl.where(same_stretch(1 << level, form.C), dp, 0.0)
            dq += tl.where(later, product(squares, columns, tl.float32, form.PRECISION) * decay, 0.0)
            dk += tl.where(later, 0.0, product(tl.trans(squares), rows, tl.float32, form.PRECISION) * decay)
    else:
        ds = dp * decays(sums, at, form.C, form.GATES, True)
        dq = product(ds, k, form.OPERAND, form.PRECISION)
        dk = product(tl.trans(ds), q, form.OPERAND, form.PRECISION)
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
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
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
    at = locate(chunks, chunk, b, T)
    slot = tl.load(chunks + 3 * chunk + 2)
    d = tile * BK + tl.arange(0, BK)
    gates = Rows(sums, h // (H // HG), HG, K if GATES == 2 else 1)
    entered, values = States(states, B, h, H, K, V), Rows(v, h // (H // HV), HV, V)
    BD: tl.constexpr = BK if GATES == 2 else 1
    GROUP: tl.constexpr = HO // H
    # As in `carry`: there is no room for more in fp32 beside decays per channel.
    SEEN: tl.constexpr = OPERAND if GATES == 2 else operand(v, OPERAND)
    k_tile = load_rows(Rows(k, h // (H // HK), HK, K), at, d, C)
    g = tl.zeros([C, BD], dtype=tl.float32)
    if GATES:
        g = load_sums(gates, at, tl.arange(0, C), d, GATES)
    dk_total = tl.zeros([C, BK], dtype=tl.float32)
    later = tl.zeros([C, BD], dtype=tl.float32)
    if INSIDE or READ:
        for member in range(GROUP):
            ho = h * GROUP + member
            q_tile = load_rows(Rows(q, ho // (HO // HQ), HQ, K), at, d, C)
            dp, dq_total = tl.zeros([C, C], dtype=tl.float32), tl.zeros([C, BK], dtype=tl.float32)
            for v0 in range(0, V, BV):
                e = v0 + tl.arange(0, BV)
                do = load_rows(Rows(grad, ho, HO, V), at, e, C)
                if READ:
                    dq_total += product(do, tl.trans(load_state(entered, slot, b, d, e)), OPERAND, PRECISION)
                if INSIDE:
                    dp += product(do, tl.trans(load_rows(values, at, e, C)), SEEN, PRECISION)
            dq_total *= scale
            if GATES:
                dq_total *= tl.exp(g)
                if TRAINED:
                    later += by_gate(q_tile * dq_total, GATES)
            if INSIDE:
                dp *= scale
                below = tl.where(seen(C, True), dp, 0.0)
                dq_below, dk_below = grad_inside(
                    q_tile, k_tile, below, gates, at, g, d, Form(C, K, BK, GATES, OPERAND, PRECISION)
                )
                if TRAINED:
                    later += by_gate(q_tile * dq_below - k_tile * dk_below, GATES)
                dq_total += dq_below
                dk_total += dk_below
                if not STRICT:  # the diagonal, which passes no gate
                    own = diagonal(dp, C)
                    dq_total += own * k_tile
                    dk_total += own * q_tile
            store_rows(Rows(dq, ho, HO, K), dq_total, at, d, C)
    dsums = running(later, GATES, True)
    if CARRIED:
        held, carried = tl.zeros([BK], dtype=tl.float32), tl.zeros([C, BK], dtype=tl.float32)
        for v0 in range(0, V, BV):
            e = v0 + tl.arange(0, BV)
            dstate = load_state(States(grad_states, B, h, H, K, V), slot, b, d, e)
            carried += product(load_rows(values, at, e, C), tl.trans(dstate), operand(v, OPERAND), PRECISION)
            if TRAINED:
                held += tl.sum(load_state(entered, slot, b, d, e) * dstate, 1)
        carried = to_end(carried, gates, at, d, C, GATES)
        if TRAINED:
            kept = by_gate(k_tile * carried, GATES)
            passed = over_chunk(by_gate_of_state(held, GATES), gates, at, d, GATES)
            dsums += running(kept, GATES, False) - kept + tl.trans(passed)
        dk_total += carried
    store_rows(Rows(dk, h, H, K), dk_total, at, d, C)
    if TRAINED:
        if GATES == 2:
            store_rows(Rows(dgates, h, H, K), dsums, at, d, C)
        else:
            part = dgates + tl.cast(tile, tl.int64) * B * T * H
            store_rows(Rows(part, h, H, 1), dsums, at, tl.arange(0, 1), C)


@triton.jit
def diagonal(tile, C: tl.constexpr):
    """That of a tile [C, C], as a column."""
    i = tl.arange(0, C)
    return tl.sum(tl.where(i[:, None] == i[None, :], tile, 0.0), 1)[:, None]


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
