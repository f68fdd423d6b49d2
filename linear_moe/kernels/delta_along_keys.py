"""What a token reads along its own key, which the delta rules know without a sum over tokens.

A write of strength b leaves of what its key read before, S'^T k = v - r, and of its own value

    S^T k = v - (1 - b |k|^2) r

with r what it finds wrong (`linear_moe.kernels.delta_walks`). Read from the state it is a sum over tokens of which, where keys
are nearly parallel and little fades, the erases leave a small rest, while what 16 bits round of every r and of every pair adds
up. So what reads of many tokens (the queries' gradient, and of heads wider than 128 the output) takes what is along the token's
own key from here. It is as exact as r, whose rounding is small beside what a strong write has left there, and may not be beside
what weak writes have: without a strong one near, tokens keep their sums.

    dq <- dq + k (scale <do, S^T k> - <dq, k>) / |k|^2
    o   = scale (S^T (q - a k) + a S^T k),   a = <q, k> / |k|^2

Of wide heads the sums that the decay's gradient is made of are known as well then: what a token's write was worth to itself and
to later ones is <dv, r>, and what its erase read <dv, v - r>.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linear_moe.kernels.blocks import NO_DECAY, load_rows, part_of, rows_left, store_rows

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
    erased_ptr,
    written_ptr,
    borders_ptr,
    borders_stride,
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
    DECAY: tl.constexpr,
    IN_FULL: tl.constexpr,
):
    """Put dq right along the token's own key, a program a chunk of a head.

    `read`, `erased` and `written`: the sums that the decay's gradient is made of; null pointers leave them as they are.
    """
    program = tl.program_id(0)
    head = program % HEADS
    start, size = part_of(borders_ptr, borders_stride, (program // HEADS).to(tl.int64), PIECE, CHUNK)
    if size == 0:
        return
    at = head.to(tl.int64) * num_tokens + start
    if DECAY != NO_DECAY:
        if tl.load(decay_ptr + at + size - 1) < LASTS:
            return
    k_head = head // (HEADS // K_HEADS)
    rows = tl.arange(0, CHUNK)
    valid = rows < rows_left(size, 0, CHUNK, IN_FULL)
    beta = tl.load(beta_ptr + at + rows, mask=valid, other=0.0)
    keys = tl.arange(0, K_BLOCK)
    k = load_rows(k_ptr, start, k_head, K_HEADS, K, rows, keys, valid).to(tl.float32)
    dq = load_rows(dq_ptr, start, head, HEADS, K, rows, keys, valid).to(tl.float32)
    squares = tl.sum(k * k, 1)
    kept = 1.0 - beta * squares
    known, own, from_values, from_wrong = (tl.zeros((CHUNK,), tl.float32),) * 4
    for first in range(0, V, COLUMNS):
        values = first + tl.arange(0, COLUMNS)
        do = load_rows(do_ptr, start, head, HEADS, V, rows, values, valid).to(tl.float32)
        v = load_rows(v_ptr, start, head, HEADS, V, rows, values, valid).to(tl.float32)
        wrong = load_rows(wrong_ptr, start, head, HEADS, V, rows, values, valid).to(tl.float32)
        known += scale * tl.sum(do * (v - kept[:, None] * wrong), 1)
        if read_ptr is not None:
            dv = load_rows(dv_ptr, start, head, HEADS, V, rows, values, valid).to(tl.float32)
            own += scale * beta * tl.sum(do * wrong, 1)
            from_values += tl.sum(dv * v, 1)
            from_wrong += tl.sum(dv * wrong, 1)
    if tl.min(kept, 0) > 1.0 - STRONG:
        return
    rest = (known - tl.sum(k * dq, 1)) / tl.where(squares > 0.0, squares, 1.0)
    dq += rest[:, None] * k
    store_rows(dq_ptr, dq, start, head, HEADS, K, rows, keys, valid)
    if read_ptr is not None:
        q = load_rows(q_ptr, start, k_head, K_HEADS, K, rows, keys, valid).to(tl.float32)
        own *= tl.sum(q * k, 1)
        tl.store(read_ptr + at + rows, tl.sum(q * dq, 1) - own, mask=valid)
        tl.store(erased_ptr + at + rows, from_wrong - from_values, mask=valid)
        tl.store(written_ptr + at + rows, from_wrong - own, mask=valid)
