"""What a token reads along its own key, which the delta rules know without a sum over tokens.

A write of strength b leaves of what its key read before, S'^T k = v - r, and of its own value

    S^T k = v - (1 - b |k|^2) r

with r what it finds wrong (`linear_moe.kernels.delta_walks`). Read from the state it is a sum over tokens of which, where keys
are nearly parallel and little fades, the erases leave a small rest, while what 16 bits round of every r and of every pair adds
up. So what reads of many tokens (the queries' gradient, and an output that is read in pieces) takes what is along the token's
own key from here. It is as exact as r, whose rounding is small beside what a strong write has left there, and may not be beside
what weak writes have: without a strong one near, tokens keep their sums.

    dq <- dq + k (scale <do, S^T k> - <dq, k>) / |k|^2
    o   = scale (S^T (q - a k) + a S^T k),   a = <q, k> / |k|^2

The sums that the decay's gradient is made of are known as well then: what a token's write was worth to itself and to later ones
is <dv, r>, and what its erase read <dv, v - r>.

Where there is a decay a pass does it, which most chunks need not (`settle_kernel`). Without one all chunks do: the kernel that
makes dq does it where a program has all keys, or leaves what each tile of them lacks to a pass over those
(`settle_tiles_kernel`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from linear_moe.kernels.blocks import load_rows, part_of, piece_of, rows_left, store_rows

LASTS = tl.constexpr(-4.0)
"""Log decay of a chunk, to base 2. Of chunks that fade by more a token reads too few others for much to add up."""
STRONG = tl.constexpr(0.25)
"""b |k|^2 of a write beside which what rounding leaves of r is small."""


@triton.jit
def along_key(overlap, squares, beta, rows):
    """<q, k> / |k|^2 of tokens that come with or after a strong write of their chunk; of others 0."""
    strength = beta * squares
    strongest = tl.max(tl.where(rows[:, None] >= rows[None, :], strength[None, :], 0.0), 1)
    return tl.where(strongest >= STRONG, overlap / tl.where(squares > 0.0, squares, 1.0), 0.0)


@triton.jit
def products_with_found(
    x_ptr, v_ptr, wrong_ptr, start, head, HEADS: tl.constexpr, V: tl.constexpr, rows, valid, begin, step,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """<x, v - r> of every row: of the COLUMNS values from `begin` on and of those every `step` after."""
    sums = tl.zeros((rows.shape[0],), tl.float32)
    for first in range(begin, V, step):
        values = first + tl.arange(0, COLUMNS)
        x = load_rows(x_ptr, start, head, HEADS, V, rows, values, valid).to(tl.float32)
        v = load_rows(v_ptr, start, head, HEADS, V, rows, values, valid).to(tl.float32)
        wrong = load_rows(wrong_ptr, start, head, HEADS, V, rows, values, valid).to(tl.float32)
        sums += tl.sum(x * (v - wrong), 1)
    return sums


@triton.jit
def rest_along_key(missed, squares, beta):
    """What of its key each row of dq lacks, of which <dq, k> lacks `missed`: of chunks with a strong write; of others 0."""
    strong = tl.max(beta * squares, 0) >= STRONG
    return tl.where(strong, missed / tl.where(squares > 0.0, squares, 1.0), 0.0)


@triton.jit
def settle_tiles_kernel(
    k_ptr,
    beta_ptr,
    missed_ptr,
    dq_ptr,
    borders_ptr,
    borders_stride,
    num_tokens,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    TILES: tl.constexpr,
    CHUNK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    IN_FULL: tl.constexpr,
):
    """Put dq right along the token's own key, a program a chunk of a head: <dq, k> lacks the sum of `missed`
    `[TILES, HEADS, S]`.
    """
    program = tl.program_id(0)
    head = program % HEADS
    start, size = piece_of(borders_ptr, borders_stride, (program // HEADS).to(tl.int64))
    if size == 0:
        return
    k_head = head // (HEADS // K_HEADS)
    rows = tl.arange(0, CHUNK)
    valid = rows < rows_left(size, 0, CHUNK, IN_FULL)
    keys = tl.arange(0, K_BLOCK)
    at = start + rows
    beta = tl.load(beta_ptr + head.to(tl.int64) * num_tokens + at, mask=valid, other=0.0)
    missed = tl.zeros((CHUNK,), tl.float32)
    for tile in tl.static_range(TILES):
        missed += tl.load(missed_ptr + (tile * HEADS + head.to(tl.int64)) * num_tokens + at, mask=valid, other=0.0)
    k = load_rows(k_ptr, start, k_head, K_HEADS, K, rows, keys, valid).to(tl.float32)
    dq = load_rows(dq_ptr, start, head, HEADS, K, rows, keys, valid).to(tl.float32)
    dq += rest_along_key(missed, tl.sum(k * k, 1), beta)[:, None] * k
    store_rows(dq_ptr, dq, start, head, HEADS, K, rows, keys, valid)


MOST_TOGETHER = 8
"""Chunks of a program that settles: most fade, and a program for each takes longer to come and go than to see that."""


@triton.jit
def _settle_chunk(
    q_ptr, k_ptr, v_ptr, do_ptr, dv_ptr, wrong_ptr, beta_ptr, dq_ptr, read_ptr, written_ptr, start, size, head, num_tokens,
    scale, HEADS: tl.constexpr, K_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
    K_BLOCK: tl.constexpr, COLUMNS: tl.constexpr, READ_TILES: tl.constexpr, WRITTEN_TILES: tl.constexpr, IN_FULL: tl.constexpr,
):  # fmt: skip
    k_head = head // (HEADS // K_HEADS)
    rows = tl.arange(0, CHUNK)
    valid = rows < rows_left(size, 0, CHUNK, IN_FULL)
    token = start + rows
    at = head.to(tl.int64) * num_tokens + token
    beta = tl.load(beta_ptr + at, mask=valid, other=0.0)
    keys = tl.arange(0, K_BLOCK)
    k = load_rows(k_ptr, start, k_head, K_HEADS, K, rows, keys, valid).to(tl.float32)
    squares = tl.sum(k * k, 1)
    if tl.max(beta * squares, 0) >= STRONG:
        dq = load_rows(dq_ptr, start, head, HEADS, K, rows, keys, valid).to(tl.float32)
        kept = 1.0 - beta * squares
        known, own, from_values, from_wrong = (tl.zeros((CHUNK,), tl.float32),) * 4
        for first in range(0, V, COLUMNS):
            values = first + tl.arange(0, COLUMNS)
            do = load_rows(do_ptr, start, head, HEADS, V, rows, values, valid).to(tl.float32)
            dv = load_rows(dv_ptr, start, head, HEADS, V, rows, values, valid).to(tl.float32)
            v = load_rows(v_ptr, start, head, HEADS, V, rows, values, valid).to(tl.float32)
            wrong = load_rows(wrong_ptr, start, head, HEADS, V, rows, values, valid).to(tl.float32)
            known += scale * tl.sum(do * (v - kept[:, None] * wrong), 1)
            own += scale * beta * tl.sum(do * wrong, 1)
            from_values += tl.sum(dv * v, 1)
            from_wrong += tl.sum(dv * wrong, 1)
        dq += rest_along_key(known - tl.sum(k * dq, 1), squares, beta)[:, None] * k
        store_rows(dq_ptr, dq, start, head, HEADS, K, rows, keys, valid)
        q = load_rows(q_ptr, start, k_head, K_HEADS, K, rows, keys, valid).to(tl.float32)
        own *= tl.sum(q * k, 1)
        tl.store(read_ptr + at, tl.sum(q * dq, 1) - own + from_wrong - from_values, mask=valid)
        tl.store(written_ptr + at, from_wrong - own, mask=valid)
        # All is in the first tile's.
        nothing = tl.zeros((CHUNK,), tl.float32)
        for tile in tl.static_range(1, READ_TILES):
            tl.store(read_ptr + (tile * HEADS + head.to(tl.int64)) * num_tokens + token, nothing, mask=valid)
        for tile in tl.static_range(1, WRITTEN_TILES):
            tl.store(written_ptr + (tile * HEADS + head.to(tl.int64)) * num_tokens + token, nothing, mask=valid)


@triton.jit
def settle_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dv_ptr,
    wrong_ptr,
    decay_ptr,
    beta_ptr,
    dq_ptr,
    read_ptr,
    written_ptr,
    borders_ptr,
    borders_stride,
    num_chunks,
    together,
    num_tokens,
    scale,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PIECE: tl.constexpr,
    CHUNK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    READ_TILES: tl.constexpr,
    WRITTEN_TILES: tl.constexpr,
    MOST: tl.constexpr,
    IN_FULL: tl.constexpr,
):
    """Put dq right along the token's own key where there is a decay, and with it the sums that the decay's gradient is made of:
    `read` `[READ_TILES, HEADS, S]` and `written` `[WRITTEN_TILES, HEADS, S]`. A program has `together` chunks of a head, at
    most MOST.
    """
    program = tl.program_id(0)
    head = program % HEADS
    begin = (program // HEADS).to(tl.int64) * together
    end = tl.minimum(begin + together, num_chunks)
    each = begin + tl.arange(0, MOST)
    ends = decay_ptr + head.to(tl.int64) * num_tokens - 1
    starts, sizes = part_of(borders_ptr, borders_stride, tl.minimum(each, num_chunks - 1), PIECE, CHUNK)
    totals = tl.load(ends + starts + sizes, mask=(each < end) & (sizes > 0), other=float("-inf"))
    if tl.max(totals, 0) < LASTS:
        return
    for step in range(end - begin):
        start, size = part_of(borders_ptr, borders_stride, begin + step, PIECE, CHUNK)
        total = tl.load(ends + start + size, mask=size > 0, other=float("-inf"))
        if total >= LASTS:
            _settle_chunk(
                q_ptr, k_ptr, v_ptr, do_ptr, dv_ptr, wrong_ptr, beta_ptr, dq_ptr, read_ptr, written_ptr, start, size, head,
                num_tokens, scale, HEADS, K_HEADS, K, V, CHUNK, K_BLOCK, COLUMNS, READ_TILES, WRITTEN_TILES, IN_FULL,
            )  # fmt: skip
