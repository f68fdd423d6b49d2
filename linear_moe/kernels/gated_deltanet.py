"""The delta rule with a scalar decay or none: S' = a S_{t-1}; S_t = S' + b k (v - S'^T k)^T; o_t = scale q^T S_t.

With r_t = v_t - S'^T k_t what a write finds wrong and u_t = b_t r_t what it writes, the recurrence is the scalar scan of u,
and so are its gradients for q and k. What the erase adds is that r depends on itself: in a chunk that starts from S_0,

    x = v - e^G k S_0,   r = x - E (b x),   E = A (I + diag(b) A)^-1,   A_tj = <k_t, k_j> e^(G_t - G_j) for j < t

(2412.06464, section 3.3, solved for r rather than u: nothing is divided by b, which may be 0). Six kernels:

    _solve       chunk-parallel: E, and the reads P_tj = <q_t, k_j> e^(G_t - G_j), j <= t
    _forward     forwards, a tile of value channels: r and o, from the state S [K, tile] in registers
    _values      backwards, likewise: dw = du - E^T (b du) with du = dS^T k, dv = b dw, and b's gradient <dw, r>
    _pairs       chunk-parallel: <do_t, u_j> and <dv_t, u_j>, decayed
    _queries     forwards, a tile of key channels, state S^T: dq, and the erase's part of dk, -S'_t dv_t
    _keys        backwards, likewise, state dS^T: the write's part of dk, dS_t u_t

The decay's gradient is made of sums that the last two leave behind (`linear_moe.kernels.decay_gradient`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.forms import Decay
from linear_moe.kernels.blocks import (
    DECAY_KINDS,
    NO_DECAY,
    block_of,
    cdiv,
    chunk_sums,
    load_columns,
    load_rows,
    num_processors,
    pair_decays,
    piece_of,
    precision_of,
    state_offsets,
    store_rows,
    summed_decays,
    tile_of,
    zero_uncovered,
)
from linear_moe.kernels.decay_gradient import decay_gradient
from linear_moe.kernels.join import join_affine
from linear_moe.kernels.splits import Ragged, Splits, cut, split_length


class Launch(NamedTuple):
    """Launch parameters of the walks."""

    chunk: int
    tile: int
    """Channels of a program: of values, or of keys for the gradients of queries and keys."""
    num_warps: int
    num_stages: int


def choose_launch(walk: str, key_dim: int, value_dim: int, dtype: torch.dtype) -> Launch:
    """Launch parameters of `walk`: "forward", "values", "queries" or "keys". All share one chunk.

    From a frozen table, measured on an H100 (torch 2.11, triton 3.6, bf16; ms at B8 T4096 H16 K = V = 128, 1 to 3 stages):
    forward 0.405, 0.407, 0.288; values 0.414, 0.505, 0.467; queries 0.597, 0.699, -; keys 0.547, 0.579, -. Tiles of 32 and 8
    warps are slower. At B32 T2048 H16 K = V = 64, 1 and 2 stages: values 0.436, 0.354; queries 0.534, 0.462; keys 0.522, 0.462.
    """
    largest = max(key_dim, value_dim)
    if dtype == torch.float32:
        # Exact products take no tensor cores, and the tiles twice the memory.
        return Launch(chunk=32, tile=32 if largest <= 128 else 16, num_warps=4, num_stages=1)
    if largest > 128:
        return Launch(chunk=64, tile=64, num_warps=8, num_stages=2 if walk in ("forward", "values") else 1)
    if walk == "forward":
        return Launch(chunk=64, tile=64, num_warps=4, num_stages=3)
    return Launch(chunk=64, tile=64, num_warps=4, num_stages=2 if largest <= 64 else 1)


@triton.jit
def _unit_lower_inverse(lower, SIZE: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + lower)^-1 of a strictly lower triangle `[SIZE, SIZE]` float32, by doubling the blocks that are inverted.

    With X the inverse of the blocks of one width and L what joins two of them, the pair's inverse is X - X L X: block
    substitution, whose terms stay small where powers of the whole triangle would not (keys nearly parallel).
    """
    rows = tl.arange(0, SIZE)
    row, column = rows[:, None], rows[None, :]
    inverse = tl.where(row == column, 1.0, tl.where((row == column + 1) & (row % 2 == 1), -lower, 0.0))
    for level in tl.static_range(1, LEVELS):
        joins = (row // (2 << level) == column // (2 << level)) & (row // (1 << level) != column // (1 << level))
        step = tl.dot(tl.where(joins, lower, 0.0), inverse, input_precision=PRECISION)
        inverse -= tl.dot(inverse, step, input_precision=PRECISION)
    return inverse


@triton.jit
def _solve_kernel(
    q_ptr,
    k_ptr,
    decay_ptr,
    beta_ptr,
    erasure_ptr,
    reads_ptr,
    borders_ptr,
    borders_stride,
    num_tokens,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    K_BLOCK: tl.constexpr,
    DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % HEADS
    start, size = piece_of(borders_ptr, borders_stride, (program // HEADS).to(tl.int64))
    if size == 0:
        return
    k_head = head // (HEADS // K_HEADS)
    rows = tl.arange(0, CHUNK)
    keys = tl.arange(0, K_BLOCK)
    valid = rows < size
    k = load_rows(k_ptr, start, k_head, K_HEADS, K, rows, keys, valid)
    beta = tl.load(beta_ptr + head.to(tl.int64) * num_tokens + start + rows, mask=valid, other=0.0)
    overlaps = tl.dot(k, tl.trans(k), input_precision=PRECISION)
    seen = rows[:, None] >= rows[None, :]
    if DECAY != NO_DECAY:
        summed, _ = summed_decays(decay_ptr, 0.0, head, start, rows, size, num_tokens, DECAY)
        pairs = pair_decays(summed[:, None], summed[None, :], seen)
        overlaps *= pairs
    q = load_rows(q_ptr, start, k_head, K_HEADS, K, rows, keys, valid)
    reads = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if DECAY != NO_DECAY:
        reads *= pairs
    store_rows(reads_ptr, tl.where(seen, reads, 0.0), start, head, HEADS, CHUNK, rows, rows, valid)
    overlaps = tl.where(rows[:, None] > rows[None, :], overlaps, 0.0)
    inverse = _unit_lower_inverse(overlaps * beta[:, None], CHUNK, LEVELS, PRECISION)
    erasure = tl.dot(overlaps, inverse, input_precision=PRECISION)
    store_rows(erasure_ptr, erasure, start, head, HEADS, CHUNK, rows, rows, valid)


@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    decay_ptr,
    beta_ptr,
    erasure_ptr,
    reads_ptr,
    o_ptr,
    wrong_ptr,
    initial_ptr,
    final_ptr,
    borders_ptr,
    borders_stride,
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
    TRANSITION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A null pointer leaves its part out. TRANSITION: no values and a start of I, whose final state is what the piece does
    to any state `[K, K]`.
    """
    NUM_TILES: tl.constexpr = (V + TILE - 1) // TILE
    program = tl.program_id(0)
    tile = program % NUM_TILES
    head = (program // NUM_TILES) % HEADS
    piece = (program // (NUM_TILES * HEADS)).to(tl.int64)
    start, size = piece_of(borders_ptr, borders_stride, piece)
    k_head = head // (HEADS // K_HEADS)
    rows = tl.arange(0, CHUNK)
    keys = tl.arange(0, K_BLOCK)
    values = tile * TILE + tl.arange(0, TILE)
    dtype = k_ptr.dtype.element_ty
    state_at = state_offsets(piece, head, HEADS, keys, values, K, V, False)
    in_state = (keys < K)[:, None] & (values < V)[None, :]
    if TRANSITION:
        state = (keys[:, None] == values[None, :]).to(tl.float32)
    elif initial_ptr is not None:
        state = tl.load(initial_ptr + state_at, mask=in_state, other=0.0)
    else:
        state = tl.zeros((K_BLOCK, TILE), tl.float32)
    for chunk in range(tl.cdiv(size, CHUNK)):
        first = start + chunk * CHUNK
        valid = rows < size - chunk * CHUNK
        k = load_rows(k_ptr, first, k_head, K_HEADS, K, rows, keys, valid)
        erasure = load_rows(erasure_ptr, first, head, HEADS, CHUNK, rows, rows, valid)
        beta = tl.load(beta_ptr + head.to(tl.int64) * num_tokens + first + rows, mask=valid, other=0.0)[:, None]
        rounded = state.to(dtype)
        wrong = -tl.dot(k, rounded, input_precision=PRECISION)
        if DECAY != NO_DECAY:
            summed, total = summed_decays(
                decay_ptr, 0.0, head, first, rows, tl.minimum(size - chunk * CHUNK, CHUNK), num_tokens, DECAY
            )
            from_start = tl.exp(summed.to(tl.float32))[:, None]
            to_end = tl.exp(tl.minimum(total - summed, 0.0).to(tl.float32))[:, None]
            wrong *= from_start
        if not TRANSITION:
            wrong += load_rows(v_ptr, first, head, HEADS, V, rows, values, valid).to(tl.float32)
        wrong = tl.dot(erasure, (-beta * wrong).to(dtype), acc=wrong, input_precision=PRECISION)
        written = beta * wrong
        if wrong_ptr is not None:
            store_rows(wrong_ptr, wrong, first, head, HEADS, V, rows, values, valid)
        if o_ptr is not None:
            q = load_rows(q_ptr, first, k_head, K_HEADS, K, rows, keys, valid)
            reads = load_rows(reads_ptr, first, head, HEADS, CHUNK, rows, rows, valid)
            o = tl.dot(q, rounded, input_precision=PRECISION)
            if DECAY != NO_DECAY:
                o *= from_start
            o = tl.dot(reads, written.to(dtype), acc=o, input_precision=PRECISION)
            store_rows(o_ptr, scale * o, first, head, HEADS, V, rows, values, valid)
        if DECAY != NO_DECAY:
            state *= tl.exp(total.to(tl.float32))
            written *= to_end
        state = tl.dot(tl.trans(k), written.to(dtype), acc=state, input_precision=PRECISION)
    if final_ptr is not None:
        tl.store(final_ptr + state_at, state, mask=in_state)


@triton.jit
def _values_kernel(
    q_ptr,
    k_ptr,
    do_ptr,
    wrong_ptr,
    decay_ptr,
    beta_ptr,
    erasure_ptr,
    reads_ptr,
    dv_ptr,
    dbeta_ptr,
    initial_ptr,
    final_ptr,
    borders_ptr,
    borders_stride,
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
    PRECISION: tl.constexpr,
):
    """`initial` is the gradient of the piece's last state, `final` that of its first; without `dv`, states alone.

    The walk is linear in `do` and its start, so `scale` stands outside it.
    """
    NUM_TILES: tl.constexpr = (V + TILE - 1) // TILE
    program = tl.program_id(0)
    tile = program % NUM_TILES
    head = (program // NUM_TILES) % HEADS
    piece = (program // (NUM_TILES * HEADS)).to(tl.int64)
    start, size = piece_of(borders_ptr, borders_stride, piece)
    k_head = head // (HEADS // K_HEADS)
    rows = tl.arange(0, CHUNK)
    keys = tl.arange(0, K_BLOCK)
    values = tile * TILE + tl.arange(0, TILE)
    dtype = k_ptr.dtype.element_ty
    state_at = state_offsets(piece, head, HEADS, keys, values, K, V, False)
    in_state = (keys < K)[:, None] & (values < V)[None, :]
    if initial_ptr is not None:
        state = tl.load(initial_ptr + state_at, mask=in_state, other=0.0) / scale
    else:
        state = tl.zeros((K_BLOCK, TILE), tl.float32)
    num_chunks = tl.cdiv(size, CHUNK)
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step
        first = start + chunk * CHUNK
        valid = rows < size - chunk * CHUNK
        k = load_rows(k_ptr, first, k_head, K_HEADS, K, rows, keys, valid)
        q = load_rows(q_ptr, first, k_head, K_HEADS, K, rows, keys, valid)
        do = load_rows(do_ptr, first, head, HEADS, V, rows, values, valid)
        later_reads = load_columns(reads_ptr, first, head, HEADS, CHUNK, rows, rows, valid)
        later_erasure = load_columns(erasure_ptr, first, head, HEADS, CHUNK, rows, rows, valid)
        beta = tl.load(beta_ptr + head.to(tl.int64) * num_tokens + first + rows, mask=valid, other=0.0)[:, None]
        d_write = tl.dot(k, state.to(dtype), input_precision=PRECISION)
        read = do
        if DECAY != NO_DECAY:
            summed, total = summed_decays(
                decay_ptr, 0.0, head, first, rows, tl.minimum(size - chunk * CHUNK, CHUNK), num_tokens, DECAY
            )
            from_start = tl.exp(summed.to(tl.float32))[:, None]
            d_write *= tl.exp(tl.minimum(total - summed, 0.0).to(tl.float32))[:, None]
            state *= tl.exp(total.to(tl.float32))
            read = (do.to(tl.float32) * from_start).to(dtype)
        d_write = tl.dot(later_reads, do, acc=d_write, input_precision=PRECISION)
        d_write = tl.dot(later_erasure, (-beta * d_write).to(dtype), acc=d_write, input_precision=PRECISION)
        dv = beta * d_write
        if dv_ptr is not None:
            wrong = load_rows(wrong_ptr, first, head, HEADS, V, rows, values, valid).to(tl.float32)
            at = (tile * HEADS + head).to(tl.int64) * num_tokens + first + rows
            tl.store(dbeta_ptr + at, scale * tl.sum(d_write * wrong, 1), mask=valid)
            store_rows(dv_ptr, scale * dv, first, head, HEADS, V, rows, values, valid)
        if DECAY != NO_DECAY:
            dv *= from_start
        state = tl.dot(tl.trans(q), read, acc=state, input_precision=PRECISION)
        state = tl.dot(tl.trans(k), (-dv).to(dtype), acc=state, input_precision=PRECISION)
    if final_ptr is not None:
        tl.store(final_ptr + state_at, scale * state, mask=in_state)


@triton.jit
def _pairs_kernel(
    do_ptr,
    dv_ptr,
    wrong_ptr,
    decay_ptr,
    beta_ptr,
    reads_ptr,
    erases_ptr,
    own_ptr,
    borders_ptr,
    borders_stride,
    num_tokens,
    scale,
    HEADS: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % HEADS
    start, size = piece_of(borders_ptr, borders_stride, (program // HEADS).to(tl.int64))
    if size == 0:
        return
    rows = tl.arange(0, CHUNK)
    values = tl.arange(0, V_BLOCK)
    valid = rows < size
    at = head.to(tl.int64) * num_tokens + start + rows
    wrong = load_rows(wrong_ptr, start, head, HEADS, V, rows, values, valid)
    do = load_rows(do_ptr, start, head, HEADS, V, rows, values, valid)
    dv = load_rows(dv_ptr, start, head, HEADS, V, rows, values, valid)
    beta = tl.load(beta_ptr + at, mask=valid, other=0.0)
    earlier = rows[:, None] > rows[None, :]
    # What is written is u = b r.
    weights = tl.broadcast_to(beta[None, :], (CHUNK, CHUNK))
    if DECAY != NO_DECAY:
        summed, _ = summed_decays(decay_ptr, 0.0, head, start, rows, size, num_tokens, DECAY)
        weights *= pair_decays(summed[:, None], summed[None, :], earlier)
    reads = scale * tl.dot(do, tl.trans(wrong), input_precision=PRECISION)
    # A token's own pair crosses nothing: it stands apart from the sums that the decay's gradient is made of.
    own = beta * tl.sum(tl.where(rows[:, None] == rows[None, :], reads, 0.0), 1)
    tl.store(own_ptr + at, own, mask=valid)
    store_rows(reads_ptr, tl.where(earlier, weights * reads, 0.0), start, head, HEADS, CHUNK, rows, rows, valid)
    erases = tl.dot(dv, tl.trans(wrong), input_precision=PRECISION)
    store_rows(erases_ptr, tl.where(earlier, -weights * erases, 0.0), start, head, HEADS, CHUNK, rows, rows, valid)


@triton.jit
def _queries_kernel(
    q_ptr,
    k_ptr,
    do_ptr,
    dv_ptr,
    wrong_ptr,
    decay_ptr,
    beta_ptr,
    reads_ptr,
    erases_ptr,
    own_ptr,
    dq_ptr,
    dk_ptr,
    overlap_ptr,
    initial_ptr,
    borders_ptr,
    borders_stride,
    num_tokens,
    scale,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    NUM_TILES: tl.constexpr = (K + TILE - 1) // TILE
    program = tl.program_id(0)
    tile = program % NUM_TILES
    head = (program // NUM_TILES) % HEADS
    piece = (program // (NUM_TILES * HEADS)).to(tl.int64)
    start, size = piece_of(borders_ptr, borders_stride, piece)
    k_head = head // (HEADS // K_HEADS)
    rows = tl.arange(0, CHUNK)
    values = tl.arange(0, V_BLOCK)
    keys = tile * TILE + tl.arange(0, TILE)
    dtype = k_ptr.dtype.element_ty
    if initial_ptr is not None:
        state_at = state_offsets(piece, head, HEADS, values, keys, V, K, True)
        state = tl.load(initial_ptr + state_at, mask=(values < V)[:, None] & (keys < K)[None, :], other=0.0)
    else:
        state = tl.zeros((V_BLOCK, TILE), tl.float32)
    for chunk in range(tl.cdiv(size, CHUNK)):
        first = start + chunk * CHUNK
        valid = rows < size - chunk * CHUNK
        at = head.to(tl.int64) * num_tokens + first + rows
        do = load_rows(do_ptr, first, head, HEADS, V, rows, values, valid)
        dv = load_rows(dv_ptr, first, head, HEADS, V, rows, values, valid)
        wrong = load_rows(wrong_ptr, first, head, HEADS, V, rows, values, valid)
        reads = load_rows(reads_ptr, first, head, HEADS, CHUNK, rows, rows, valid)
        erases = load_rows(erases_ptr, first, head, HEADS, CHUNK, rows, rows, valid)
        k = load_rows(k_ptr, first, k_head, K_HEADS, K, rows, keys, valid)
        # u = b r is never made: b goes into what u is multiplied with, so that r goes from memory into the products as it is.
        written = tl.load(beta_ptr + at, mask=valid, other=0.0)
        rounded = state.to(dtype)
        if DECAY != NO_DECAY:
            summed, total = summed_decays(
                decay_ptr, 0.0, head, first, rows, tl.minimum(size - chunk * CHUNK, CHUNK), num_tokens, DECAY
            )
            from_start = tl.exp(summed.to(tl.float32))[:, None]
            written *= tl.exp((total - summed).to(tl.float32))
            state *= tl.exp(total.to(tl.float32))
        dk = -tl.dot(dv, rounded, input_precision=PRECISION)
        if DECAY != NO_DECAY:
            dk *= from_start
        dk = tl.dot(erases, k, acc=dk, input_precision=PRECISION)
        store_rows(dk_ptr, dk, first, head, HEADS, K, rows, keys, valid)
        dq = scale * tl.dot(do, rounded, input_precision=PRECISION)
        if DECAY != NO_DECAY:
            dq *= from_start
        if overlap_ptr is not None:
            overlap = tl.sum(k.to(tl.float32) * dk, 1)
        dq = tl.dot(reads, k, acc=dq, input_precision=PRECISION)
        if overlap_ptr is not None:
            q = load_rows(q_ptr, first, k_head, K_HEADS, K, rows, keys, valid)
            overlap += tl.sum(q.to(tl.float32) * dq, 1)
            tl.store(overlap_ptr + tile.to(tl.int64) * HEADS * num_tokens + at, overlap, mask=valid)
        own = tl.load(own_ptr + at, mask=valid, other=0.0)
        dq += own[:, None] * k.to(tl.float32)
        store_rows(dq_ptr, dq, first, head, HEADS, K, rows, keys, valid)
        keep = (written[:, None] * k.to(tl.float32)).to(dtype)
        state = tl.dot(tl.trans(wrong), keep, acc=state, input_precision=PRECISION)


@triton.jit
def _keys_kernel(
    q_ptr,
    k_ptr,
    do_ptr,
    dv_ptr,
    wrong_ptr,
    decay_ptr,
    beta_ptr,
    reads_ptr,
    erases_ptr,
    own_ptr,
    dk_ptr,
    overlap_ptr,
    initial_ptr,
    borders_ptr,
    borders_stride,
    num_tokens,
    scale,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the write's part to the erase's part that `dk` already holds."""
    NUM_TILES: tl.constexpr = (K + TILE - 1) // TILE
    program = tl.program_id(0)
    tile = program % NUM_TILES
    head = (program // NUM_TILES) % HEADS
    piece = (program // (NUM_TILES * HEADS)).to(tl.int64)
    start, size = piece_of(borders_ptr, borders_stride, piece)
    k_head = head // (HEADS // K_HEADS)
    rows = tl.arange(0, CHUNK)
    values = tl.arange(0, V_BLOCK)
    keys = tile * TILE + tl.arange(0, TILE)
    dtype = k_ptr.dtype.element_ty
    if initial_ptr is not None:
        state_at = state_offsets(piece, head, HEADS, values, keys, V, K, True)
        state = tl.load(initial_ptr + state_at, mask=(values < V)[:, None] & (keys < K)[None, :], other=0.0)
    else:
        state = tl.zeros((V_BLOCK, TILE), tl.float32)
    num_chunks = tl.cdiv(size, CHUNK)
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step
        first = start + chunk * CHUNK
        valid = rows < size - chunk * CHUNK
        at = head.to(tl.int64) * num_tokens + first + rows
        wrong = load_rows(wrong_ptr, first, head, HEADS, V, rows, values, valid)
        do = load_rows(do_ptr, first, head, HEADS, V, rows, values, valid)
        dv = load_rows(dv_ptr, first, head, HEADS, V, rows, values, valid)
        later_reads = load_columns(reads_ptr, first, head, HEADS, CHUNK, rows, rows, valid)
        later_erases = load_columns(erases_ptr, first, head, HEADS, CHUNK, rows, rows, valid)
        q = load_rows(q_ptr, first, k_head, K_HEADS, K, rows, keys, valid)
        k = load_rows(k_ptr, first, k_head, K_HEADS, K, rows, keys, valid)
        written = tl.load(beta_ptr + at, mask=valid, other=0.0)
        asked = scale * q.to(tl.float32)
        erased = -k.to(tl.float32)
        rounded = state.to(dtype)
        if DECAY != NO_DECAY:
            summed, total = summed_decays(
                decay_ptr, 0.0, head, first, rows, tl.minimum(size - chunk * CHUNK, CHUNK), num_tokens, DECAY
            )
            from_start = tl.exp(summed.to(tl.float32))[:, None]
            written *= tl.exp((total - summed).to(tl.float32))
            state *= tl.exp(total.to(tl.float32))
            asked *= from_start
            erased *= from_start
        dk = written[:, None] * tl.dot(wrong, rounded, input_precision=PRECISION)
        dk = tl.dot(later_reads, q, acc=dk, input_precision=PRECISION)
        dk = tl.dot(later_erases, k, acc=dk, input_precision=PRECISION)
        if overlap_ptr is not None:
            overlap = tl.sum(k.to(tl.float32) * dk, 1)
            tl.store(overlap_ptr + tile.to(tl.int64) * HEADS * num_tokens + at, overlap, mask=valid)
        own = tl.load(own_ptr + at, mask=valid, other=0.0)
        dk += own[:, None] * q.to(tl.float32)
        dk += load_rows(dk_ptr, first, head, HEADS, K, rows, keys, valid).to(tl.float32)
        store_rows(dk_ptr, dk, first, head, HEADS, K, rows, keys, valid)
        state = tl.dot(tl.trans(do), asked.to(dtype), acc=state, input_precision=PRECISION)
        state = tl.dot(tl.trans(dv), erased.to(dtype), acc=state, input_precision=PRECISION)


class Solved(NamedTuple):
    """What a chunk knows of its own pairs, `[S, H, C]` in the dtype of q: a token's row of its chunk's matrices."""

    erasure: Tensor
    """E"""
    reads: Tensor
    """P"""


class _Walk(NamedTuple):
    """What all walks of one call have in common."""

    kind: int
    decays: Tensor | None
    """The sums of a chunk's log decays `[H, S]`."""
    beta: Tensor
    """Heads first, `[H, S]` float32."""
    splits: Splits
    chunks: Splits
    """A piece is a multiple of a chunk: chunks of segments are chunks of pieces."""

    def constants(self, k: Tensor, v: Tensor) -> dict[str, object]:
        return {
            "HEADS": v.shape[1],
            "K_HEADS": k.shape[1],
            "K": k.shape[2],
            "V": v.shape[2],
            "DECAY": self.kind,
            "PRECISION": precision_of(k.dtype),
        }


def chunk_length(k: Tensor, v: Tensor) -> int:
    """C"""
    return choose_launch("forward", k.shape[2], v.shape[2], k.dtype).chunk


def piece_length(k: Tensor, v: Tensor, ragged: Ragged) -> int | None:
    """Tokens of a piece where long segments are split, from sizes alone."""
    launch = choose_launch("forward", k.shape[2], v.shape[2], k.dtype)
    tiles = cdiv(v.shape[2], tile_of(v.shape[2], launch.tile, v.dtype))
    return split_length(v.shape[0], ragged.max_length, v.shape[1] * tiles, num_processors(v.device), launch.chunk)


def _walk_of(k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor, ragged: Ragged, decay: Decay) -> _Walk:
    chunk = chunk_length(k, v)
    chunks = cut(ragged.cu_seqlens, v.shape[0], chunk, ragged.max_length)
    decays = None
    if log_decay is not None:
        decays = chunk_sums(log_decay, chunks.borders, chunk, exact=k.dtype == torch.float32)
    splits = ragged.pieces(v.shape[0], piece_length(k, v, ragged))
    return _Walk(DECAY_KINDS[decay], decays, beta.t().contiguous(), splits, chunks)


def _launch(walk: str, k: Tensor, v: Tensor, splits: Splits) -> tuple[tuple[int], dict[str, int]]:
    """The grid of a walk and its launch parameters."""
    launch = choose_launch(walk, k.shape[2], v.shape[2], k.dtype)
    by_values = walk in ("forward", "values")
    tiled, whole = (v.shape[2], k.shape[2]) if by_values else (k.shape[2], v.shape[2])
    tile = tile_of(tiled, launch.tile, k.dtype)
    parameters = {
        "CHUNK": launch.chunk,
        "TILE": tile,
        "K_BLOCK" if by_values else "V_BLOCK": block_of(whole),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
    return (splits.num_pieces * v.shape[1] * cdiv(tiled, tile),), parameters


def _solve(q: Tensor, k: Tensor, v: Tensor, walk: _Walk) -> Solved:
    num_tokens, heads = v.shape[:2]
    chunk = chunk_length(k, v)
    erasure, reads = (torch.empty(num_tokens, heads, chunk, dtype=k.dtype, device=k.device) for _ in range(2))
    constants = walk.constants(k, v)
    del constants["V"]
    _solve_kernel[(walk.chunks.num_pieces * heads,)](
        q,
        k,
        walk.decays,
        walk.beta,
        erasure,
        reads,
        walk.chunks.borders,
        walk.chunks.borders.stride(0),
        num_tokens,
        CHUNK=chunk,
        LEVELS=chunk.bit_length() - 1,
        K_BLOCK=block_of(k.shape[2]),
        num_warps=4,
        num_stages=1,
        **constants,
    )
    return Solved(erasure, reads)


def _run_forward(
    walk: _Walk,
    solved: Solved,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = 1.0,
    output: Tensor | None = None,
    wrong: Tensor | None = None,
    starts: Tensor | None = None,
    final: Tensor | None = None,
    transition: bool = False,
    borders: Tensor | None = None,
) -> None:
    borders = walk.splits.borders if borders is None else borders
    grid, parameters = _launch("forward", k, v, walk.splits)
    _forward_kernel[grid](
        q,
        k,
        v,
        walk.decays,
        walk.beta,
        solved.erasure,
        solved.reads,
        output,
        wrong,
        starts,
        final,
        borders,
        borders.stride(0),
        v.shape[0],
        scale,
        TRANSITION=transition,
        **parameters,
        **walk.constants(k, v),
    )


class Kept(NamedTuple):
    """What the backward pass needs of the forward pass."""

    wrong: Tensor
    """r `[S, H, V]` in the dtype of v."""
    solved: Solved
    starts: Tensor | None
    """`[P, H, K, V]` float32, the state each piece starts from, where segments were split."""
    transitions: Tensor | None
    """`[P, H, K, K]` float32, what each piece does to a state, where segments were split."""


class Forward(NamedTuple):
    """What a forward pass makes."""

    output: Tensor
    """`[S, H, V]` in the dtype of v."""
    final_state: Tensor | None
    """`[N, H, K, V]` float32, if wanted."""
    kept: Kept | None
    """If wanted."""


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    ragged: Ragged,
    *,
    decay: Decay,
    scale: float,
    want_final: bool,
    keep: bool,
) -> Forward:
    """The recurrence along ragged segments; arguments as the library op's. `keep`: return what `backward` needs."""
    walk = _walk_of(k, v, log_decay, beta, ragged, decay)
    solved = _solve(q, k, v, walk)
    heads, key_dim, value_dim = v.shape[1], k.shape[2], v.shape[2]
    splits = walk.splits
    starts, transitions = initial_state, None
    if splits.cut:
        transitions = torch.empty(splits.num_pieces, heads, key_dim, key_dim, device=k.device)
        # Only the width of the values matters here: K columns of I.
        columns = k.new_empty(1, 1, 1).expand(v.shape[0], heads, key_dim)
        _run_forward(walk, solved, q, k, columns, final=transitions, transition=True, borders=splits.several)
        increments = torch.empty(splits.num_pieces, heads, key_dim, value_dim, device=k.device)
        _run_forward(walk, solved, q, k, v, final=increments, borders=splits.leading)
        exact = k.dtype == torch.float32
        starts, _ = join_affine(increments, transitions, initial_state, splits, exact=exact)
    piece_ends = None
    if want_final:
        piece_ends = torch.empty(splits.num_pieces, heads, key_dim, value_dim, device=k.device)
    output = torch.empty_like(v)
    wrong = torch.empty_like(v) if keep else None
    _run_forward(walk, solved, q, k, v, scale=scale, output=output, wrong=wrong, starts=starts, final=piece_ends)
    if not ragged.dense:
        zero_uncovered(output, ragged.cu_seqlens)
    kept = None if wrong is None else Kept(wrong, solved, starts if splits.cut else None, transitions)
    return Forward(output, None if piece_ends is None else splits.ends(piece_ends), kept)


class Backward(NamedTuple):
    """The gradients, each in the dtype of its input; the gates' in float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor
    initial_state: Tensor | None


def backward(
    d_output: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    kept: Kept,
    ragged: Ragged,
    *,
    decay: Decay,
    scale: float,
) -> Backward:
    """The gradients of `forward`; `kept` as it returned it."""
    walk = _walk_of(k, v, log_decay, beta, ragged, decay)
    num_tokens, heads, value_dim = v.shape
    key_dim, splits = k.shape[2], walk.splits
    constants = walk.constants(k, v)
    starts = kept.starts if splits.cut else initial_state
    gates = (walk.decays, walk.beta)
    grid, parameters = _launch("values", k, v, walk.splits)
    tiles = cdiv(value_dim, parameters["TILE"])
    d_beta = torch.zeros(tiles, heads, num_tokens, dtype=torch.float32, device=v.device)
    dv = torch.empty_like(v)

    def run_values(output: Tensor | None, start: Tensor | None, final: Tensor | None, borders: Tensor) -> None:
        _values_kernel[grid](
            q, k, d_output, kept.wrong, *gates, kept.solved.erasure, kept.solved.reads, output, d_beta, start, final, borders,
            borders.stride(0), num_tokens, scale, **parameters, **constants,
        )  # fmt: skip

    reverse_starts = d_final
    if splits.cut:
        assert kept.transitions is not None and splits.trailing is not None
        increments = torch.empty(splits.num_pieces, heads, key_dim, value_dim, device=v.device)
        run_values(None, None, increments, splits.trailing)
        exact = k.dtype == torch.float32
        reverse_starts, _ = join_affine(increments, kept.transitions.mT, d_final, splits, reverse=True, exact=exact)
    piece_ends = None
    if starts is not None:
        piece_ends = torch.empty(splits.num_pieces, heads, key_dim, value_dim, device=v.device)
    run_values(dv, reverse_starts, piece_ends, splits.borders)

    chunk = chunk_length(k, v)
    reads, erases = (torch.empty(num_tokens, heads, chunk, dtype=k.dtype, device=k.device) for _ in range(2))
    own = torch.empty(heads, num_tokens, dtype=torch.float32, device=k.device)
    _pairs_kernel[(walk.chunks.num_pieces * heads,)](
        d_output, dv, kept.wrong, *gates, reads, erases, own, walk.chunks.borders, walk.chunks.borders.stride(0), num_tokens,
        scale, HEADS=heads, V=value_dim, CHUNK=chunk, V_BLOCK=block_of(value_dim), DECAY=walk.kind,
        PRECISION=precision_of(k.dtype), num_warps=4, num_stages=1,
    )  # fmt: skip
    # A key head's gradient is the sum over the value heads that share it, in float32.
    shared = k.shape[1] != heads
    dtype = torch.float32 if shared else k.dtype
    dq, dk = (torch.empty(num_tokens, heads, key_dim, dtype=dtype, device=k.device) for _ in range(2))
    both = (q, k, d_output, dv, kept.wrong, *gates, reads, erases, own)
    where = (walk.splits.borders, walk.splits.borders.stride(0), num_tokens, scale)

    def new_overlap(tile: int) -> Tensor | None:
        if log_decay is None:
            return None
        return torch.empty(cdiv(key_dim, tile), heads, num_tokens, dtype=torch.float32, device=v.device)

    grid, parameters = _launch("queries", k, v, walk.splits)
    read = new_overlap(parameters["TILE"])
    _queries_kernel[grid](*both, dq, dk, read, starts, *where, **parameters, **constants)
    grid, parameters = _launch("keys", k, v, walk.splits)
    written = new_overlap(parameters["TILE"])
    _keys_kernel[grid](*both, dk, written, reverse_starts, *where, **parameters, **constants)
    if not ragged.dense:
        for gradient in (dq, dk, dv):
            zero_uncovered(gradient, ragged.cu_seqlens)
    d_decay = None
    if read is not None and written is not None:
        at_start = None
        if starts is not None:
            assert piece_ends is not None
            at_start = torch.linalg.vecdot(starts.flatten(2), piece_ends.flatten(2))
        d_decay = decay_gradient(read, written, at_start, walk.splits.borders).t().contiguous()
    if shared:
        dq, dk = (x.unflatten(1, (k.shape[1], -1)).sum(2).to(k.dtype) for x in (dq, dk))
    d_initial = None
    if initial_state is not None:
        assert piece_ends is not None
        d_initial = splits.ends(piece_ends, reverse=True)
    return Backward(dq, dk, dv, d_decay, d_beta.sum(0).t().contiguous(), d_initial)
