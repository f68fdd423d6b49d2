"""Kernels of recurrences without erase whose decay is none, a constant a head, or a scalar a token.

    scan      a program walks the chunks of one (piece of a segment, head, tile of value channels), its K x V-tile state in
              registers: every input is read once and every output written once
    writes    the walk back for dk and dv together, where a program holds a head's whole state twice

The scan gives all four results of training,

    o  = scan(q, k, v)             forwards in time
    dq = scan(do, v, k)            forwards:  dq_t = sum_{j <= t} decay(t, j) <do_t, v_j> k_j
    dk = scan(v, do, q)            backwards: dk_t = sum_{j >= t} decay(j, t) <v_t, do_j> q_j
    dv = scan(k, q, do)            backwards: dv_t = sum_{j >= t} decay(j, t) <k_t, q_j> do_j

so that no accumulator is ever transposed. Beside dq and dv it leaves what the decay's gradient is made of
(`linear_moe.kernels.decay_gradient`), <dq, q> and <dv, v> without each token's own pair, in float32 before anything is rounded:

    <o_t, other_t> - own = before_t <q_t S, other_t> + sum_{j < t} decay(t, j) <q_t, k_j> <v_j, other_t>
"""

from __future__ import annotations

import triton
import triton.language as tl

from linear_moe.kernels.blocks import (
    LOG2E,
    NO_DECAY,
    SCALAR_DECAY,
    decay_between,
    decay_of,
    decay_where,
    is_mild,
    load_rows,
    load_start,
    product,
    rate_of,
    rows_left,
    state_offsets,
    store_rows,
    sum_dtype,
    sum_of_products,
    summed_decays,
    walk_at,
)


@triton.jit
def scan_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    decay_ptr,
    o_ptr,
    initial_ptr,
    joined_ptr,
    owner_ptr,
    first_ptr,
    final_ptr,
    total_ptr,
    overlap_ptr,
    other_ptr,
    borders_ptr,
    borders_stride,
    order_ptr,
    num_tokens,
    scale,
    state_scale,
    HEADS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    OTHER_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_TILE: tl.constexpr,
    DECAY: tl.constexpr,
    IN_FULL: tl.constexpr,
    REVERSE: tl.constexpr,
    TRANSPOSED_STATE: tl.constexpr,
    THREADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A null pointer leaves its part out: no output, no initial or final state, no overlap.

    The walk is linear in its start and in v, so a scale on what is written stands outside it: on the reads, and on the
    initial and final state. Without an output it goes the other way, from where the piece ends on: what is written fades by all
    that comes after it at once, and the state, which starts at 0 then, by nothing.
    """
    NUM_TILES: tl.constexpr = (V + V_TILE - 1) // V_TILE
    tile, head, piece, start, size = walk_at(order_ptr, borders_ptr, borders_stride, HEADS, NUM_TILES)
    q_head = head // (HEADS // Q_HEADS)
    k_head = head // (HEADS // K_HEADS)
    v_head = head // (HEADS // V_HEADS)
    rows = tl.arange(0, CHUNK)
    keys = tl.arange(0, K_BLOCK)
    values = tile * V_TILE + tl.arange(0, V_TILE)
    dtype = k_ptr.dtype.element_ty

    state_at = state_offsets(piece, head, HEADS, keys, values, K, V, TRANSPOSED_STATE)
    in_state = (keys < K)[:, None] & (values < V)[None, :]
    state = load_start(
        initial_ptr, joined_ptr, owner_ptr, first_ptr, piece, head, HEADS, keys, values, K, V, TRANSPOSED_STATE, REVERSE
    )  # fmt: skip
    state /= state_scale
    rate = rate_of(decay_ptr, head, DECAY, PRECISION)
    if o_ptr is None:
        tl.static_assert((initial_ptr is None) and (joined_ptr is None), "a state alone is of what a piece writes")
        reach = tl.zeros((), sum_dtype(PRECISION))
    BACKWARDS: tl.constexpr = (o_ptr is None) != REVERSE

    num_chunks = tl.cdiv(size, CHUNK)
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step if BACKWARDS else step
        first = start + chunk * CHUNK
        num_rows = rows_left(size, chunk * CHUNK, CHUNK, IN_FULL)
        valid = rows < num_rows
        k = load_rows(k_ptr, first, k_head, K_HEADS, K, rows, keys, valid)
        v = load_rows(v_ptr, first, v_head, V_HEADS, V, rows, values, valid)
        # `before` brings the chunk's incoming state to a row, `after` a row's write to the outgoing state.
        if DECAY != NO_DECAY:
            summed, total = summed_decays(decay_ptr, rate, head, first, rows, num_rows, num_tokens, DECAY, THREADS)
            if o_ptr is None:
                left = summed if REVERSE else tl.minimum(total - summed, 0.0)
                after = decay_of(left + reach)
                reach += total
            else:
                to_end = decay_between(total, summed)
                from_start = decay_of(summed)
                before = to_end if REVERSE else from_start
                after = from_start if REVERSE else to_end
        if o_ptr is not None:
            q = load_rows(q_ptr, first, q_head, Q_HEADS, K, rows, keys, valid)
            products = product(q, tl.trans(k), PRECISION)
            seen = rows[:, None] <= rows[None, :] if REVERSE else rows[:, None] >= rows[None, :]
            if DECAY == NO_DECAY:
                products = tl.where(seen, products, 0.0)
            elif REVERSE:
                products *= decay_where(seen, summed[None, :], summed[:, None])
            else:
                products *= decay_where(seen, summed[:, None], summed[None, :])
            if overlap_ptr is not None:
                # A token's own pair crosses nothing.
                other = load_rows(other_ptr, first, head // (HEADS // OTHER_HEADS), OTHER_HEADS, V, rows, values, valid)
                met = product(other, tl.trans(v), PRECISION)
                overlap = tl.sum(tl.where(rows[:, None] != rows[None, :], products * met, 0.0), 1)
            o = product(q, state.to(dtype), PRECISION)
            if DECAY != NO_DECAY:
                o *= before[:, None]
            if overlap_ptr is not None:
                overlap += tl.sum(o * other.to(tl.float32), 1)
                at = (tile * HEADS + head).to(tl.int64) * num_tokens + first + rows
                tl.store(overlap_ptr + at, scale * overlap, mask=valid)
            o = scale * sum_of_products(products.to(dtype), v, o, PRECISION)
            store_rows(o_ptr, o, first, head, HEADS, V, rows, values, valid)
        if DECAY != NO_DECAY:
            if o_ptr is not None:
                state *= decay_of(total)
            v = (v.to(tl.float32) * after[:, None]).to(dtype)
        state = sum_of_products(tl.trans(k), v, state, PRECISION).to(tl.float32)
    if final_ptr is not None:
        tl.store(final_ptr + state_at, state_scale * state, mask=in_state)
    if total_ptr is not None:
        if tile == 0:
            tl.store(total_ptr + piece * HEADS + head, (reach / LOG2E).to(tl.float32))


@triton.jit
def writes_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    decay_ptr,
    dk_ptr,
    dv_ptr,
    initial_ptr,
    joined_ptr,
    owner_ptr,
    first_ptr,
    final_ptr,
    written_ptr,
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
    V_BLOCK: tl.constexpr,
    DECAY: tl.constexpr,
    MILD: tl.constexpr,
    ALONE: tl.constexpr,
    IN_FULL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Both dk and dv in one walk back, where one program has all channels of both: q, k, v and do are read once. The state's
    gradient lies in shared memory for the one product and, transposed, for the other.

    `initial` and `final`: the gradients of the last and the first state. `written`: <dv, v> without a token's own pair. A null
    pointer leaves its part out. MILD: whether decays are mild, and factors of a token, as in `linear_moe.kernels.turned_scan`,
    here of do, seen from a chunk's start; else they are of pairs. Both ways in one kernel would take the registers of both:
    unless it is ALONE, another launch takes the walks whose decays are not of its kind.
    """
    _, head, piece, start, size = walk_at(order_ptr, borders_ptr, borders_stride, HEADS, 1)
    rate = rate_of(decay_ptr, head, DECAY, PRECISION)
    if not ALONE:
        sums_ptr = decay_ptr
        if DECAY == SCALAR_DECAY:
            sums_ptr += head.to(tl.int64) * num_tokens + start
        if is_mild(sums_ptr, rate, size, CHUNK, DECAY) != MILD:
            return
    k_head = head // (HEADS // K_HEADS)
    rows = tl.arange(0, CHUNK)
    keys = tl.arange(0, K_BLOCK)
    values = tl.arange(0, V_BLOCK)
    dtype = k_ptr.dtype.element_ty
    seen = rows[:, None] <= rows[None, :]
    state_at = state_offsets(piece, head, HEADS, keys, values, K, V, False)
    in_state = (keys < K)[:, None] & (values < V)[None, :]
    state = load_start(
        initial_ptr, joined_ptr, owner_ptr, first_ptr, piece, head, HEADS, keys, values, K, V, False, True
    )  # fmt: skip
    state /= scale
    num_chunks = tl.cdiv(size, CHUNK)
    for step in range(num_chunks):
        done = (num_chunks - 1 - step) * CHUNK
        first = start + done
        num_rows = rows_left(size, done, CHUNK, IN_FULL)
        valid = rows < num_rows
        q = load_rows(q_ptr, first, k_head, K_HEADS, K, rows, keys, valid)
        k = load_rows(k_ptr, first, k_head, K_HEADS, K, rows, keys, valid)
        v = load_rows(v_ptr, first, head, HEADS, V, rows, values, valid)
        do = load_rows(do_ptr, first, head, HEADS, V, rows, values, valid)
        if DECAY != NO_DECAY:
            summed, total = summed_decays(decay_ptr, rate, head, first, rows, num_rows, num_tokens, DECAY)
            after = decay_of(summed)[:, None]
            if MILD:
                # Pairs fade by what is asked and by what is made of it: one exponential a token.
                do = (do.to(tl.float32) * after).to(dtype)
                made = decay_of(-summed)
            else:
                before = decay_between(total, summed)[:, None]
                pairs = decay_where(seen, summed[None, :], summed[:, None])
        asked = product(k, tl.trans(q), PRECISION)
        wanted = product(v, tl.trans(do), PRECISION)
        if MILD:
            if DECAY != NO_DECAY:
                state *= decay_of(total)
            asked = tl.where(seen, asked, 0.0)
        else:
            asked *= pairs
        if written_ptr is not None:
            written = tl.sum(tl.where(rows[:, None] != rows[None, :], asked * wanted, 0.0), 1)
        if MILD:
            wanted = tl.where(seen, wanted, 0.0)
        else:
            wanted *= pairs
        rounded = state.to(dtype)
        dv = product(k, rounded, PRECISION)
        if not MILD:
            dv *= before
        if written_ptr is not None:
            written += tl.sum(dv * v.to(tl.float32), 1)
            if MILD:
                written *= made
            tl.store(written_ptr + head.to(tl.int64) * num_tokens + first + rows, scale * written, mask=valid)
        dv = sum_of_products(asked.to(dtype), do, dv, PRECISION)
        dk = product(v, tl.trans(rounded), PRECISION)
        if not MILD:
            dk *= before
        dk = sum_of_products(wanted.to(dtype), q, dk, PRECISION)
        if not MILD:
            state *= decay_of(total)
            do = (do.to(tl.float32) * after).to(dtype)
        state = sum_of_products(tl.trans(q), do, state, PRECISION).to(tl.float32)
        if MILD and DECAY != NO_DECAY:
            dv *= (scale * made)[:, None]
            dk *= (scale * made)[:, None]
        else:
            dv *= scale
            dk *= scale
        store_rows(dv_ptr, dv, first, head, HEADS, V, rows, values, valid)
        store_rows(dk_ptr, dk, first, head, HEADS, K, rows, keys, valid)
    if final_ptr is not None:
        tl.store(final_ptr + state_at, scale * state, mask=in_state)
