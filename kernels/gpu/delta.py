"""The delta family: what the decay family's kernels lack, which is the triangular system of each chunk.

Notation and conventions as in `decay.py`; the mathematics is that of `lasp/kernels/portable/delta.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lasp.kernels.gpu.decay import (
    Form,
    Rows,
    from_start,
    levels,
    load_rows,
    locate,
    place,
    product,
    scores,
    seen,
    store_rows,
)

# Rows that are eliminated one by one, 2 ** 4: the least that a product takes.
BLOCK = tl.constexpr(16)


@triton.jit
def at_blocks(x, at, row, column, C: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr):
    """N blocks of a chunk's lower triangular matrix [C, C], kept as [B, T, H, C]: addresses [N, SIZE, SIZE], and which
    are of the matrix. The first block starts at `row` and `column`, each of the others C / N further."""
    n, i = tl.arange(0, N)[:, None, None] * (C // N), tl.arange(0, SIZE)
    rows, columns = n + row + i[None, :, None], n + column + i[None, None, :]
    first = (tl.cast(at.b, tl.int64) * at.T + at.start) * x.H + x.h
    return x.pointer + first * C + rows * (x.H * C) + columns, (rows < at.length) & (columns <= rows)


@triton.jit
def load_blocks(x, at, row, column, C: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr):
    address, mask = at_blocks(x, at, row, column, C, N, SIZE)
    return tl.load(address, mask=mask, other=0.0)


@triton.jit
def invert(system, inverse, at, C: tl.constexpr):
    """`(I + a)^-1` of a chunk's strictly lower triangular a [C, C], from `system` to `inverse`, in fp32 throughout.

    Blocks of 16 on the diagonal by elimination, all of them at once. Then neighbours X, Y are joined by `-Y·a·X`
    between them until one block is left. What is above the diagonal stays unwritten.
    """
    blocks: tl.constexpr = C // BLOCK
    i = tl.arange(0, BLOCK)
    a = load_blocks(system, at, 0, 0, C, blocks, BLOCK)
    x = tl.zeros([blocks, BLOCK, BLOCK], dtype=tl.float32) + tl.where(i[:, None] == i[None, :], 1.0, 0.0)[None, :, :]
    for line in range(1, BLOCK):
        here = (i == line)[None, :, None]
        a_line = tl.sum(tl.where(here, a, 0.0), 1)
        x = tl.where(here, x - tl.sum(a_line[:, :, None] * x, 1)[:, None, :], x)
    address, mask = at_blocks(inverse, at, 0, 0, C, blocks, BLOCK)
    tl.store(address, x, mask=mask)
    for level in tl.static_range(4, levels(C)):
        join(system, inverse, at, C, C >> (level + 1), 1 << level)
    tl.debug_barrier()


@triton.jit
def join(system, inverse, at, C: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr):
    """N pairs of neighbouring blocks of the inverse, `-Y·a·X`."""
    tl.debug_barrier()
    x = load_blocks(inverse, at, 0, 0, C, N, SIZE)
    y = load_blocks(inverse, at, SIZE, SIZE, C, N, SIZE)
    a = load_blocks(system, at, SIZE, 0, C, N, SIZE)
    between = tl.dot(tl.dot(y, a, input_precision="tf32x3"), x, input_precision="tf32x3")
    address, mask = at_blocks(inverse, at, SIZE, 0, C, N, SIZE)
    tl.store(address, -between, mask=mask)


@triton.jit
def solve(
    k, v, beta, sums, system, inverse, written, erased, chunks, T,
    HK: tl.constexpr, HV: tl.constexpr, HG: tl.constexpr, HB: tl.constexpr, H: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`X = (I + diag(beta)·A)^-1`, `U = X·diag(beta)·v` and `W = X·diag(beta)·K'` of each chunk and state.

    `system` is room for diag(beta)·A, [B, T, H, C].
    """
    chunk, b, h = tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H
    at = locate(chunks, chunk, b, T)
    keys = Rows(k, h // (H // HK), HK, K)
    gates = Rows(sums, h // (H // HG), HG, K if GATES == 2 else 1)
    # Keys decayed per channel are rounded once more than others.
    SCORES: tl.constexpr = tl.float32 if GATES == 2 else OPERAND
    a = scores(keys, keys, gates, at, Form(C, K, BK, GATES, SCORES, PRECISION), True)
    rate = load_rows(Rows(beta, h // (H // HB), HB, 1), at, tl.arange(0, 1), C).to(tl.float32)
    store_rows(Rows(system, h, H, C), rate * a, at, tl.arange(0, C), C)
    tl.debug_barrier()
    invert(Rows(system, h, H, C), Rows(inverse, h, H, C), at, C)
    x = load_inverse(Rows(inverse, h, H, C), at, C)
    for v0 in range(0, V, BV):
        e = v0 + tl.arange(0, BV)
        values = rate * load_rows(Rows(v, h // (H // HV), HV, V), at, e, C)
        store_rows(Rows(written, h, H, V), product(x, values, tl.float32, PRECISION), at, e, C)
    for k0 in range(0, K, BK):
        d = k0 + tl.arange(0, BK)
        decayed = from_start(rate * load_rows(keys, at, d, C), gates, at, d, C, GATES)
        store_rows(Rows(erased, h, H, K), product(x, decayed, tl.float32, PRECISION), at, d, C)


@triton.jit
def load_inverse(inverse, at, C: tl.constexpr):
    x = load_rows(inverse, at, tl.arange(0, C), C)
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
    at = locate(chunks, chunk, b, T)
    e = tile * BV + tl.arange(0, BV)
    x = load_inverse(Rows(inverse, h, H, C), at, C)
    y = product(tl.trans(x), load_rows(Rows(grad_written, h, H, V), at, e, C), tl.float32, PRECISION)
    rate = load_rows(Rows(beta, h // (H // HB), HB, 1), at, tl.arange(0, 1), C)
    store_rows(Rows(dv, h, H, V), y * rate, at, e, C)
    part = tl.sum(y * load_rows(Rows(error, h, H, V), at, e, C), 1)[:, None]
    store_rows(Rows(dbeta + tl.cast(tile, tl.int64) * B * T * H, h, H, 1), part, at, tl.arange(0, 1), C)
