"""The delta rule's forward walk where nothing is kept for a backward pass: what `delta_walks.forward_kernel` makes, faster.

It makes the reads' matrix P itself, which `solve` would have to write and walks to read, and has value channels for rows. A
state that is kept as `[values, keys]` is the left factor of every product that it is in,

    x^T = v^T - e^G S^T k^T      r^T = x^T - (b x)^T E^T      u = b r      o^T = e^G S^T q^T + u^T P^T      S^T += u^T k

and so are x and u of theirs. A tensor core takes a left factor from registers, where products leave it: nothing but P goes
through shared memory on its way from one product to the next. What is read from memory comes by tensor descriptors, which
take no registers for addresses; rows past a piece's end and channels past the last come as zeros.

P takes an exponential a pair. Of a mild decay (`linear_moe.kernels.mild_decays`) a token takes one: with s the sums of a
chunk's log decays and m the one at its middle,

    w_j = e^(m - s_j) u_j      o^T = e^(s_i - m) (e^m S^T q^T + w^T (k q^T, j <= i))      e^m S^T <- e^m S^T + w^T k

where the state, too, is as much too large or small as e^(s_C - m), which it takes on with the next chunk's e^m.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linear_moe.kernels.blocks import (
    NO_DECAY,
    decay_between,
    decay_of,
    decay_where,
    load_numbers,
    load_start,
    rows_left,
    state_offsets,
    store_rows,
    summed_decays,
    walk_at,
)
from linear_moe.kernels.descriptors import described_rows
from linear_moe.kernels.mild_decays import LIMIT, strongest_decay


@triton.jit
def _walk(
    state, qs, ks, vs, erasures, decay_ptr, beta_ptr, o_ptr, start, begin, end, size, head, tile, num_tokens, scale,
    HEADS: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, DECAY: tl.constexpr, MILD: tl.constexpr,
    IN_FULL: tl.constexpr, THREADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after chunks `begin` to `end` of a piece, whose reads are stored."""
    rows = tl.arange(0, CHUNK)
    values = tile * TILE + tl.arange(0, TILE)
    seen = rows[:, None] <= rows[None, :]
    carry = tl.zeros((), tl.float64 if PRECISION == "ieee" else tl.float32)
    for chunk in range(begin, end):
        done = chunk * CHUNK
        first = start + done
        num_rows = rows_left(size, done, CHUNK, IN_FULL)
        valid = rows < num_rows
        q, k, erasure = qs.load([done, 0]), ks.load([done, 0]), erasures.load([done, 0])
        v = tl.trans(vs.load([done, tile * TILE])).to(tl.float32)
        beta = load_numbers(beta_ptr + head.to(tl.int64) * num_tokens + first, rows, valid, THREADS)
        writes = beta
        if DECAY != NO_DECAY:
            summed, total = summed_decays(decay_ptr, 0.0, head, first, rows, num_rows, num_tokens, DECAY, THREADS)
            fades = decay_of(summed)
            if MILD:
                middle = tl.load(
                    decay_ptr + head.to(tl.int64) * num_tokens + first + tl.minimum(CHUNK // 2, num_rows) - 1
                )
                state *= decay_of(carry + middle)
                carry = total - middle
                fades = decay_of(summed - middle)
                writes = beta * decay_of(middle - summed)
        pairs = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if MILD:
            pairs = tl.where(seen, pairs, 0.0)
        else:
            pairs *= decay_where(seen, summed[None, :], summed[:, None])
        # Before the next product: its sums take their registers.
        pairs = pairs.to(k.dtype)
        rounded = state.to(k.dtype)
        wrong = tl.dot(rounded, tl.trans(k), input_precision=PRECISION)
        o = tl.dot(rounded, tl.trans(q), input_precision=PRECISION)
        if DECAY != NO_DECAY:
            wrong = v - wrong * fades[None, :]
        else:
            wrong = v - wrong
        wrong = tl.dot((-beta[None, :] * wrong).to(k.dtype), tl.trans(erasure), acc=wrong, input_precision=PRECISION)
        written = wrong * writes[None, :]
        if not MILD:
            o *= fades[None, :]
        o = tl.dot(written.to(k.dtype), pairs, acc=o, input_precision=PRECISION)
        if MILD and DECAY != NO_DECAY:
            o *= (scale * fades)[None, :]
        else:
            o *= scale
        store_rows(o_ptr, tl.trans(o.to(k.dtype)), first, head, HEADS, V, rows, values, valid)
        if not MILD:
            state *= decay_of(total)
            written *= decay_between(total, summed)[None, :]
        state = tl.dot(written.to(k.dtype), k, acc=state, input_precision=PRECISION)
    if MILD and DECAY != NO_DECAY:
        state *= decay_of(carry)
    return state


@triton.jit
def turned_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    decay_ptr,
    beta_ptr,
    erasure_ptr,
    o_ptr,
    initial_ptr,
    joined_ptr,
    owner_ptr,
    first_ptr,
    final_ptr,
    borders_ptr,
    borders_stride,
    order_ptr,
    num_tokens,
    scale,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DECAY: tl.constexpr,
    RANGE: tl.constexpr,
    IN_FULL: tl.constexpr,
    THREADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A null pointer leaves its part out. RANGE: whether the dtype has room for what a mild decay scales."""
    NUM_TILES: tl.constexpr = (V + TILE - 1) // TILE
    tile, head, piece, start, size = walk_at(order_ptr, borders_ptr, borders_stride, HEADS, NUM_TILES)
    k_head = head // (HEADS // K_HEADS)
    keys = tl.arange(0, K_BLOCK)
    values = tile * TILE + tl.arange(0, TILE)
    qs = described_rows(q_ptr, start, size, k_head, K_HEADS, K, CHUNK, K_BLOCK)
    ks = described_rows(k_ptr, start, size, k_head, K_HEADS, K, CHUNK, K_BLOCK)
    vs = described_rows(v_ptr, start, size, head, HEADS, V, CHUNK, TILE)
    erasures = described_rows(erasure_ptr, start, size, head, HEADS, CHUNK, CHUNK, CHUNK)
    state = load_start(
        initial_ptr, joined_ptr, owner_ptr, first_ptr, piece, head, HEADS, values, keys, V, K, True, False
    )
    num_chunks = tl.cdiv(size, CHUNK)
    mild = num_chunks
    if DECAY != NO_DECAY:
        mild *= RANGE
        if RANGE:
            sums_ptr = decay_ptr + head.to(tl.int64) * num_tokens + start
            mild = tl.where(strongest_decay(sums_ptr, 0.0, size, CHUNK, DECAY) >= -LIMIT, num_chunks, 0)
    # One after the other, of which one has nothing to do: in two branches they would have memory of their own each.
    state = _walk(
        state, qs, ks, vs, erasures, decay_ptr, beta_ptr, o_ptr, start, 0, mild, size, head, tile, num_tokens, scale, HEADS, V,
        CHUNK, TILE, DECAY, True, IN_FULL, THREADS, PRECISION,
    )  # fmt: skip
    if DECAY != NO_DECAY:
        state = _walk(
            state, qs, ks, vs, erasures, decay_ptr, beta_ptr, o_ptr, start, mild, num_chunks, size, head, tile, num_tokens,
            scale, HEADS, V, CHUNK, TILE, DECAY, False, IN_FULL, THREADS, PRECISION,
        )  # fmt: skip
    if final_ptr is not None:
        at = state_offsets(piece, head, HEADS, values, keys, V, K, True)
        tl.store(final_ptr + at, state, mask=(values < V)[:, None] & (keys < K)[None, :])
