"""The delta family: what the decay family's kernels lack, which is the triangular system of each chunk.

Notation and conventions as in `decay.py`; the mathematics is that of `lasp/kernels/portable/delta.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lasp.kernels.gpu.decay import from_start, load_rows, place, product, scores, seen, store_rows

# Rows that are eliminated one by one, 2 ** 4: the least that a product takes.
BLOCK = tl.constexpr(16)


@triton.jit
def at_blocks(
    pointer, start, length, b, h, T, H: tl.constexpr, C: tl.constexpr, row, column, N: tl.constexpr, SIZE: tl.constexpr
):
    """N blocks of a chunk's lower triangular matrix [C, C], kept as [B, T, H, C]: addresses [N, SIZE, SIZE], and which
    are of the matrix. The first block starts at `row` and `column`, each of the others C / N further."""
    n, i = tl.arange(0, N)[:, None, None] * (C // N), tl.arange(0, SIZE)
    rows, columns = n + row + i[None, :, None], n + column + i[None, None, :]
    first = (tl.cast(b, tl.int64) * T + start) * H + h
    return pointer + first * C + rows * (H * C) + columns, (rows < length) & (columns <= rows)


@triton.jit
def load_blocks(
    pointer, start, length, b, h, T, H: tl.constexpr, C: tl.constexpr, row, column, N: tl.constexpr, SIZE: tl.constexpr
):
    at, mask = at_blocks(pointer, start, length, b, h, T, H, C, row, column, N, SIZE)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def invert(system, inverse, start, length, b, h, T, H: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr):
    """`(I + a)^-1` of a chunk's strictly lower triangular a [C, C], from `system` to `inverse`, in fp32 throughout.

    Blocks of 16 on the diagonal by elimination, all of them at once. Then neighbours X, Y are joined by `-Y·a·X`
    between them until one block is left. What is above the diagonal stays unwritten.
    """
    blocks: tl.constexpr = C // BLOCK
    i = tl.arange(0, BLOCK)
    a = load_blocks(system, start, length, b, h, T, H, C, 0, 0, blocks, BLOCK)
    x = tl.zeros([blocks, BLOCK, BLOCK], dtype=tl.float32) + tl.where(i[:, None] == i[None, :], 1.0, 0.0)[None, :, :]
    for line in range(1, BLOCK):
        here = (i == line)[None, :, None]
        a_line = tl.sum(tl.where(here, a, 0.0), 1)
        x = tl.where(here, x - tl.sum(a_line[:, :, None] * x, 1)[:, None, :], x)
    at, mask = at_blocks(inverse, start, length, b, h, T, H, C, 0, 0, blocks, BLOCK)
    tl.store(at, x, mask=mask)
    for level in tl.static_range(4, LEVELS):
        join(system, inverse, start, length, b, h, T, H, C, C >> (level + 1), 1 << level)
    tl.debug_barrier()


@triton.jit
def join(
    system, inverse, start, length, b, h, T, H: tl.constexpr, C: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr
):
    """N pairs of neighbouring blocks of the inverse, `-Y·a·X`."""
    tl.debug_barrier()
    x = load_blocks(inverse, start, length, b, h, T, H, C, 0, 0, N, SIZE)
    y = load_blocks(inverse, start, length, b, h, T, H, C, SIZE, SIZE, N, SIZE)
    a = load_blocks(system, start, length, b, h, T, H, C, SIZE, 0, N, SIZE)
    between = tl.dot(tl.dot(y, a, input_precision="tf32x3"), x, input_precision="tf32x3")
    at, mask = at_blocks(inverse, start, length, b, h, T, H, C, SIZE, 0, N, SIZE)
    tl.store(at, -between, mask=mask)


@triton.jit
def solve(
    k, v, beta, sums, system, inverse, written, erased, chunks, T,
    HK: tl.constexpr, HV: tl.constexpr, HG: tl.constexpr, HB: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, LEVELS: tl.constexpr,
    GATES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`X = (I + diag(beta)·A)^-1`, `U = X·diag(beta)·v` and `W = X·diag(beta)·K'` of each chunk and state.

    `system` is room for diag(beta)·A, [B, T, H, C].
    """
    chunk, b, h = tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H
    hk, hv, hg, hb = h // (H // HK), h // (H // HV), h // (H // HG), h // (H // HB)
    start, length = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1)
    # Keys decayed per channel are rounded once more than others.
    SCORES: tl.constexpr = tl.float32 if GATES == 2 else OPERAND
    a = scores(
        k, k, sums, start, length, b, hk, hk, hg, T, HK, HK, HG, K, C, BK, LEVELS, GATES, True, SCORES, PRECISION
    )
    rate = load_rows(beta, start, length, b, hb, T, HB, 1, tl.arange(0, 1), C).to(tl.float32)
    store_rows(system, rate * a, start, length, b, h, T, H, C, tl.arange(0, C), C)
    tl.debug_barrier()
    invert(system, inverse, start, length, b, h, T, H, C, LEVELS)
    x = load_inverse(inverse, start, length, b, h, T, H, C)
    for v0 in range(0, V, BV):
        e = v0 + tl.arange(0, BV)
        values = rate * load_rows(v, start, length, b, hv, T, HV, V, e, C)
        store_rows(written, product(x, values, tl.float32, PRECISION), start, length, b, h, T, H, V, e, C)
    for k0 in range(0, K, BK):
        d = k0 + tl.arange(0, BK)
        keys = rate * load_rows(k, start, length, b, hk, T, HK, K, d, C)
        keys = from_start(keys, sums, start, length, b, hg, T, HG, K, d, C, GATES)
        store_rows(erased, product(x, keys, tl.float32, PRECISION), start, length, b, h, T, H, K, d, C)


@triton.jit
def load_inverse(inverse, start, length, b, h, T, H: tl.constexpr, C: tl.constexpr):
    x = load_rows(inverse, start, length, b, h, T, H, C, tl.arange(0, C), C)
    return tl.where(seen(C, False), x, 0.0)


@triton.jit
def grad_solve(
    inverse, beta, grad_written, error, dv, dbeta, chunks, B, T,
    HB: tl.constexpr, H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient du of what tokens write: with `y = X^T du`, `dv = beta·y` and `dbeta = y·error`.

    error: what was asked of each token to write, [B, T, H, V]. `dbeta` is [tiles of channels, B, T, H].
    """
    chunk, tile = place(V, BV)
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    start, length = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1)
    e = tile * BV + tl.arange(0, BV)
    x = load_inverse(inverse, start, length, b, h, T, H, C)
    du = load_rows(grad_written, start, length, b, h, T, H, V, e, C)
    y = product(tl.trans(x), du, tl.float32, PRECISION)
    rate = load_rows(beta, start, length, b, h // (H // HB), T, HB, 1, tl.arange(0, 1), C)
    store_rows(dv, y * rate, start, length, b, h, T, H, V, e, C)
    part = tl.sum(y * load_rows(error, start, length, b, h, T, H, V, e, C), 1)[:, None]
    rates = dbeta + tl.cast(tile, tl.int64) * B * T * H
    store_rows(rates, part, start, length, b, h, T, H, 1, tl.arange(0, 1), C)
