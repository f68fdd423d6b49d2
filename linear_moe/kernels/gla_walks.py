"""Kernels of a decay a key channel, without erase: S_t = Diag(a_t) S_{t-1} + k_t v_t^T; o_t = scale q_t^T S_t.

With G the sum of a chunk's log decays, a chunk that starts from S_0 reads and leaves (2312.06635, section 4)

    o_t = scale ((q_t e^G_t) S_0 + sum_{j <= t} P_tj v_j),   P_tj = sum_c q_tc k_jc e^(G_tc - G_jc)
    S_C = Diag(e^G_C) S_0 + sum_j (k_j e^(G_C - G_j)) v_j^T

The exponentials are the cost, so each is made once a token and channel, never once a tile of values. Three kernels:

    prepare      chunk-parallel: q e^G, k e^(G_C - G), G_C, and P or, for gradients, e^G
    walk         the state-resident scan over these: o forwards in time. For gradients it walks both ways and stores the state
                 before each chunk, S, and with roles exchanged the state's gradient after it, D, and dv
    gradients    chunk-parallel, from S and D: dq, dk, and the decay's gradient

A channel's decay gradient at a token is what crosses to it: what was written before and is read at it or later. Before the
chunk's first token that is <S, D_0>, where D_0, D brought to the chunk's start, is e^G_C D + sum_t (q_t e^G_t) do_t^T; so it is
e^G_C <S, D> and what the chunk's own tokens read from S. Along the chunk k dk - q dq is added, where a token's own pair is in
neither (`linear_moe.kernels.decay_gradient` says why).

A chunk in which no channel fades by more than 2^LIMIT is multiplied out around half of its fading; any other by halves of it.
With the factors of a token outside, a mild chunk's gradients are products of what was prepared:

    dq_t = e^G_t A_t + own pair,        A_t = S do_t + e^-G_C sum_{j < t} <do_t, v_j> k_j e^(G_C - G_j),    q dq = (q e^G) A
    dk_t = e^(G_C - G_t) B_t + own,     B_t = D v_t + e^-G_C sum_{j > t} <v_t, do_j> q_j e^G_j,    k dk = (k e^(G_C - G)) B
"""

from __future__ import annotations

import triton
import triton.language as tl

from linear_moe.kernels.blocks import (
    LOG2E,
    decay_of,
    load_columns,
    load_rows,
    load_start,
    piece_of,
    rows_left,
    state_offsets,
    store_rows,
    sum_dtype,
    to_base_2,
    walk_at,
)

UNITS_BLOCK = tl.constexpr(64)


@triton.jit
def _fades_harshly(fades_ptr, unit, LIMIT: tl.constexpr):
    """Whether a channel of a (chunk, head) fades by more than is safe to undo."""
    return not (tl.load(fades_ptr + unit) < LIMIT)


@triton.jit
def _some_fade_harshly(fades_ptr, program, num_units, num_programs, TILES: tl.constexpr, LIMIT: tl.constexpr):
    """Whether any does of every so many units, tiles of channels of a (chunk, head), from one on. Looked up many at a time."""
    steps = tl.arange(0, UNITS_BLOCK)
    harsh = 0
    for first in range(0, tl.cdiv(num_units - program, num_programs), UNITS_BLOCK):
        unit = program + (first + steps).to(tl.int64) * num_programs
        fades = tl.load(fades_ptr + unit // TILES, mask=unit < num_units, other=0.0)
        harsh = tl.maximum(harsh, tl.max(tl.where(fades < LIMIT, 0, 1), 0))
    return harsh > 0


@triton.jit
def _halves(summed, CHUNK: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """Of each row, the sums at the first row of the later half of its block of 2 WIDTH rows."""
    blocks = tl.reshape(summed, (CHUNK // (2 * WIDTH), 2 * WIDTH, CHANNELS))
    middle = (tl.arange(0, 2 * WIDTH) == WIDTH)[None, :, None]
    reference = tl.sum(tl.where(middle, blocks, 0.0), 1)
    spread = tl.broadcast_to(reference[:, None, :], (CHUNK // (2 * WIDTH), 2 * WIDTH, CHANNELS))
    return tl.reshape(spread, (CHUNK, CHANNELS))


@triton.jit
def _crosses(later, earlier, WIDTH: tl.constexpr):
    """Whether a pair of rows lies in the later and the earlier half of one block of 2 WIDTH rows."""
    return (
        (later // (2 * WIDTH) == earlier // (2 * WIDTH))
        & (later % (2 * WIDTH) >= WIDTH)
        & (earlier % (2 * WIDTH) < WIDTH)
    )


@triton.jit
def _fade(difference):
    # In float64 it would be many instructions for each of many numbers: registers spill by the thousand.
    return decay_of(tl.minimum(difference, 0.0).to(tl.float32))


@triton.jit
def _around_middle(summed, total, LIMIT: tl.constexpr):
    """Of a mild chunk, with m = G_C / 2: e^(G - m), e^(m - G), and e^m = e^(G_C - m). All its factors are products of these.

    Of a harsh one numbers that are wrong, but finite.
    """
    middle = 0.5 * total
    difference = (summed - middle[None, :]).to(tl.float32)
    difference = tl.minimum(tl.maximum(difference, -0.5 * LIMIT), 0.5 * LIMIT)
    return decay_of(difference), decay_of(-difference), decay_of(middle.to(tl.float32))[None, :]


@triton.jit
def _halved_products(q, k, summed, DTYPE: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr,
                     LEVELS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """P for j < t, else 0, over some channels.

    A pair meets at the one level of halving at which its rows lie in different halves of a block; both refer to the later
    half's first row, so that no exponent is positive.
    """
    rows = tl.arange(0, CHUNK)
    products = tl.zeros((CHUNK, CHUNK), tl.float32)
    for level in tl.static_range(LEVELS):
        reference = _halves(summed, CHUNK, 1 << level, CHANNELS)
        reads = (q * _fade(summed - reference)).to(DTYPE)
        writes = (k * _fade(reference - summed)).to(DTYPE)
        met = tl.dot(reads, tl.trans(writes), input_precision=PRECISION)
        products += tl.where(_crosses(rows[:, None], rows[None, :], 1 << level), met, 0.0)
    return products


@triton.jit
def _halved_sum(weights, x, summed, REVERSE: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr,
                CHANNELS: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """sum_j weights_tj x_j e^(G_t - G_j) over j < t a channel, as `_halved_products`; REVERSE: over j > t, e^(G_j - G_t)."""
    rows = tl.arange(0, CHUNK)
    if REVERSE:
        later, earlier = rows[None, :], rows[:, None]
    else:
        later, earlier = rows[:, None], rows[None, :]
    result = tl.zeros((CHUNK, CHANNELS), tl.float32)
    for level in tl.static_range(LEVELS):
        reference = _halves(summed, CHUNK, 1 << level, CHANNELS)
        to_later, from_earlier = _fade(summed - reference), _fade(reference - summed)
        near = tl.where(_crosses(later, earlier, 1 << level), weights, 0.0).to(DTYPE)
        if REVERSE:
            result += from_earlier * tl.dot(near, (x * to_later).to(DTYPE), input_precision=PRECISION)
        else:
            result += to_later * tl.dot(near, (x * from_earlier).to(DTYPE), input_precision=PRECISION)
    return result


@triton.jit
def _sums(decay_ptr, first, head, HEADS: tl.constexpr, K: tl.constexpr, rows, keys, valid, EXACT: tl.constexpr):
    """G and G_C, to base 2, of some channels of a chunk."""
    each = load_rows(decay_ptr, first, head, HEADS, K, rows, keys, valid)
    if EXACT:
        each = each.to(tl.float64)
    each = to_base_2(each)
    return tl.cumsum(each, 0), tl.sum(each, 0)


@triton.jit
def _prepare_chunk(
    q_ptr, k_ptr, decay_ptr, reads_ptr, writes_ptr, products_ptr, kept_ptr, totals_ptr, fades_ptr, borders_ptr,
    borders_stride, unit, HEADS: tl.constexpr, K_HEADS: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, LEVELS: tl.constexpr, MILD: tl.constexpr, LIMIT: tl.constexpr, IN_FULL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one (chunk, head), as if it were as mild as MILD says; if so, how much it fades too."""
    EXACT: tl.constexpr = PRECISION == "ieee"
    head = unit % HEADS
    chunk = (unit // HEADS).to(tl.int64)
    start, size = piece_of(borders_ptr, borders_stride, chunk)
    k_head = head // (HEADS // K_HEADS)
    rows = tl.arange(0, CHUNK)
    valid = rows < rows_left(size, 0, CHUNK, IN_FULL)
    dtype = k_ptr.dtype.element_ty
    worst = 0.0
    if products_ptr is not None:
        products = tl.zeros((CHUNK, CHUNK), tl.float32)
        own = tl.zeros((CHUNK,), tl.float32)
    for key in range(0, K, TILE):
        keys = key + tl.arange(0, TILE)
        q = load_rows(q_ptr, start, k_head, K_HEADS, K, rows, keys, valid).to(tl.float32)
        k = load_rows(k_ptr, start, k_head, K_HEADS, K, rows, keys, valid).to(tl.float32)
        summed, total = _sums(decay_ptr, start, head, HEADS, K, rows, keys, valid, EXACT)
        if MILD:
            # A NaN is harsh, so that it gets where it belongs.
            worst = tl.maximum(worst, tl.max(tl.where(total > -LIMIT, -total, LIMIT).to(tl.float32), 0))
        if MILD and products_ptr is not None:
            up, down, half = _around_middle(summed, total, LIMIT)
            q_up, k_down = q * up, k * down
            reads, writes = q_up * half, k_down * half
            met = tl.dot(q_up.to(dtype), tl.trans(k_down.to(dtype)), input_precision=PRECISION)
            products += tl.where(rows[:, None] >= rows[None, :], met, 0.0)
        else:
            kept = _fade(summed)
            reads, writes = q * kept, k * _fade(total[None, :] - summed)
            if products_ptr is not None:
                products += _halved_products(q, k, summed, dtype, CHUNK, TILE, LEVELS, PRECISION)
                # A token's own pair is the larger part of what it reads where decays are strong.
                own += tl.sum(q * k, 1)
            if kept_ptr is not None:
                store_rows(kept_ptr, kept, start, head, HEADS, K, rows, keys, valid)
        store_rows(reads_ptr, reads, start, head, HEADS, K, rows, keys, valid)
        store_rows(writes_ptr, writes, start, head, HEADS, K, rows, keys, valid)
        tl.store(totals_ptr + (chunk * HEADS + head) * K + keys, total.to(tl.float32), mask=keys < K)
    if MILD:
        tl.store(fades_ptr + chunk * HEADS + head, worst)
    if products_ptr is not None:
        if not MILD:
            products = tl.where(rows[:, None] == rows[None, :], own[:, None], products)
        store_rows(products_ptr, products, start, head, HEADS, CHUNK, rows, rows, valid)


@triton.jit
def prepare_kernel(
    q_ptr, k_ptr, decay_ptr, reads_ptr, writes_ptr, products_ptr, kept_ptr, totals_ptr, fades_ptr, borders_ptr,
    borders_stride, num_units, num_programs, HEADS: tl.constexpr, K_HEADS: tl.constexpr, K: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, LEVELS: tl.constexpr, MILD: tl.constexpr, LIMIT: tl.constexpr,
    IN_FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A null pointer leaves P or e^G out.

    A program takes one (chunk, head) as if it were mild if MILD, and says whether it was. Else it looks for harsh ones among
    many, and makes them anew.
    """
    program = tl.program_id(0)
    if MILD:
        _prepare_chunk(
            q_ptr, k_ptr, decay_ptr, reads_ptr, writes_ptr, products_ptr, kept_ptr, totals_ptr, fades_ptr, borders_ptr,
            borders_stride, program, HEADS, K_HEADS, K, CHUNK, TILE, LEVELS, MILD, LIMIT, IN_FULL, PRECISION,
        )  # fmt: skip
    else:
        if _some_fade_harshly(fades_ptr, program, num_units, num_programs, 1, LIMIT):
            for step in range(tl.cdiv(num_units - program, num_programs)):
                unit = program + step * num_programs
                if _fades_harshly(fades_ptr, unit, LIMIT):
                    _prepare_chunk(
                        q_ptr, k_ptr, decay_ptr, reads_ptr, writes_ptr, products_ptr, kept_ptr, totals_ptr, fades_ptr,
                        borders_ptr, borders_stride, unit, HEADS, K_HEADS, K, CHUNK, TILE, LEVELS, MILD, LIMIT, IN_FULL,
                        PRECISION,
                    )  # fmt: skip


@triton.jit
def walk_kernel(
    reads_ptr,
    writes_ptr,
    v_ptr,
    products_ptr,
    totals_ptr,
    chunks_ptr,
    o_ptr,
    states_ptr,
    initial_ptr,
    joined_ptr,
    owner_ptr,
    first_ptr,
    final_ptr,
    piece_totals_ptr,
    borders_ptr,
    borders_stride,
    order_ptr,
    scale,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STORES: tl.constexpr,
    IN_FULL: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A null pointer leaves its part out; `states`, which it STORES, are those that chunks begin with, in the walk's
    direction.
    """
    NUM_TILES: tl.constexpr = (V + TILE - 1) // TILE
    tile, head, piece, start, size = walk_at(order_ptr, borders_ptr, borders_stride, HEADS, NUM_TILES)
    first_chunk = tl.load(chunks_ptr + piece)
    rows = tl.arange(0, CHUNK)
    keys = tl.arange(0, K_BLOCK)
    values = tile * TILE + tl.arange(0, TILE)
    dtype = v_ptr.dtype.element_ty
    state_at = state_offsets(piece, head, HEADS, keys, values, K, V, False)
    in_state = (keys < K)[:, None] & (values < V)[None, :]
    state = load_start(
        initial_ptr, joined_ptr, owner_ptr, first_ptr, piece, head, HEADS, keys, values, K, V, False, REVERSE
    )
    if piece_totals_ptr is not None:
        all_decay = tl.zeros((K_BLOCK,), tl.float32)
    num_chunks = tl.cdiv(size, CHUNK)
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step if REVERSE else step
        first = start + chunk * CHUNK
        valid = rows < rows_left(size, chunk * CHUNK, CHUNK, IN_FULL)
        if STORES:
            at = state_offsets(first_chunk + chunk, head, HEADS, keys, values, K, V, False)
            tl.store(states_ptr + at, state.to(dtype), mask=in_state)
        v = load_rows(v_ptr, first, head, HEADS, V, rows, values, valid)
        writes = load_rows(writes_ptr, first, head, HEADS, K, rows, keys, valid)
        total = tl.load(totals_ptr + ((first_chunk + chunk) * HEADS + head) * K + keys, mask=keys < K, other=0.0)
        if o_ptr is not None:
            reads = load_rows(reads_ptr, first, head, HEADS, K, rows, keys, valid)
            if REVERSE:
                products = load_columns(products_ptr, first, head, HEADS, CHUNK, rows, rows, valid)
            else:
                products = load_rows(products_ptr, first, head, HEADS, CHUNK, rows, rows, valid)
            o = tl.dot(reads, state.to(dtype), input_precision=PRECISION)
            o = tl.dot(products, v, acc=o, input_precision=PRECISION)
            store_rows(o_ptr, scale * o, first, head, HEADS, V, rows, values, valid)
        if piece_totals_ptr is not None:
            all_decay += total
        state *= decay_of(total)[:, None]
        state = tl.dot(tl.trans(writes), v, acc=state, input_precision=PRECISION)
    if final_ptr is not None:
        tl.store(final_ptr + state_at, state, mask=in_state)
    if piece_totals_ptr is not None:
        if tile == 0:
            tl.store(piece_totals_ptr + (piece * HEADS + head) * K + keys, all_decay / LOG2E, mask=keys < K)


@triton.jit
def _summed_before(x, later, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """The sum of the rows before each row, in float32."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        # As two products, each exact but for its additions: a row's 16 leading bits are two numbers of 8. They stay in the
        # registers of products, where a scan along the rows would want others.
        pairs = tl.where(later, 1.0, 0.0).to(DTYPE)
        high = x.to(DTYPE)
        low = (x - high.to(tl.float32)).to(DTYPE)
        total = tl.dot(pairs, low, acc=tl.dot(pairs, high))
    else:
        # In float64 where results are float32, as the decays are.
        WIDE: tl.constexpr = sum_dtype(PRECISION)
        wide = x.to(WIDE)
        total = (tl.cumsum(wide, 0) - wide).to(tl.float32)
    return total


@triton.jit
def _chunk_gradients(
    q_ptr, k_ptr, v_ptr, do_ptr, decay_ptr, reads_ptr, writes_ptr, kept_ptr, states_ptr, d_states_ptr, dq_ptr, dk_ptr,
    d_decay_ptr, totals_ptr, fades_ptr, borders_ptr, borders_stride, scale, unit, HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, LEVELS: tl.constexpr,
    MILD: tl.constexpr, LIMIT: tl.constexpr, IN_FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a tile of channels of one (chunk, head), if it is as mild as MILD says."""
    EXACT: tl.constexpr = PRECISION == "ieee"
    NUM_TILES: tl.constexpr = (K + TILE - 1) // TILE
    tile = unit % NUM_TILES
    head = (unit // NUM_TILES) % HEADS
    chunk = (unit // (NUM_TILES * HEADS)).to(tl.int64)
    start, size = piece_of(borders_ptr, borders_stride, chunk)
    # Of an empty segment no walk has stored a state.
    if (size > 0) & (_fades_harshly(fades_ptr, chunk * HEADS + head, LIMIT) != MILD):
        k_head = head // (HEADS // K_HEADS)
        rows = tl.arange(0, CHUNK)
        keys = tile * TILE + tl.arange(0, TILE)
        valid = rows < rows_left(size, 0, CHUNK, IN_FULL)
        dtype = v_ptr.dtype.element_ty
        later = rows[:, None] > rows[None, :]
        earlier = rows[:, None] < rows[None, :]
        same = rows[:, None] == rows[None, :]
        asked_of, asked_by = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, CHUNK), tl.float32)
        dq, dk = tl.zeros((CHUNK, TILE), tl.float32), tl.zeros((CHUNK, TILE), tl.float32)
        overlap = tl.zeros((TILE,), tl.float32)
        for first in range(0, V, COLUMNS):
            values = first + tl.arange(0, COLUMNS)
            state_at = state_offsets(chunk, head, HEADS, keys, values, K, V, False)
            in_state = (keys < K)[:, None] & (values < V)[None, :]
            state = tl.load(states_ptr + state_at, mask=in_state, other=0.0)
            d_state = tl.load(d_states_ptr + state_at, mask=in_state, other=0.0)
            v = load_rows(v_ptr, start, head, HEADS, V, rows, values, valid)
            do = load_rows(do_ptr, start, head, HEADS, V, rows, values, valid)
            overlap += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
            asked_of = tl.dot(do, tl.trans(v), acc=asked_of, input_precision=PRECISION)
            asked_by = tl.dot(v, tl.trans(do), acc=asked_by, input_precision=PRECISION)
            dq = tl.dot(do, tl.trans(state), acc=dq, input_precision=PRECISION)
            dk = tl.dot(v, tl.trans(d_state), acc=dk, input_precision=PRECISION)
        own = scale * tl.sum(tl.where(same, asked_of, 0.0), 1)
        total = tl.load(totals_ptr + (chunk * HEADS + head) * K + keys, mask=keys < K, other=0.0)
        crossing = decay_of(total) * overlap
        if MILD:
            reads = load_rows(reads_ptr, start, head, HEADS, K, rows, keys, valid)
            writes = load_rows(writes_ptr, start, head, HEADS, K, rows, keys, valid)
            crossing += tl.sum(reads.to(tl.float32) * dq, 0)
            undone = decay_of(-total)[None, :]
            dq += undone * tl.dot(tl.where(later, asked_of, 0.0).to(dtype), writes, input_precision=PRECISION)
            dk += undone * tl.dot(tl.where(earlier, asked_by, 0.0).to(dtype), reads, input_precision=PRECISION)
            change = writes.to(tl.float32) * dk - reads.to(tl.float32) * dq
            kept = load_rows(kept_ptr, start, head, HEADS, K, rows, keys, valid).to(tl.float32)
            dq *= kept
            # Outside of the tensor it is 0.
            dk *= decay_of(total)[None, :] / tl.where(kept > 0, kept, 1.0)
            q = load_rows(q_ptr, start, k_head, K_HEADS, K, rows, keys, valid).to(tl.float32)
            k = load_rows(k_ptr, start, k_head, K_HEADS, K, rows, keys, valid).to(tl.float32)
        else:
            q = load_rows(q_ptr, start, k_head, K_HEADS, K, rows, keys, valid).to(tl.float32)
            k = load_rows(k_ptr, start, k_head, K_HEADS, K, rows, keys, valid).to(tl.float32)
            summed, exact = _sums(decay_ptr, start, head, HEADS, K, rows, keys, valid, EXACT)
            dq *= _fade(summed)
            crossing += tl.sum(q * dq, 0)
            dq += _halved_sum(asked_of, k, summed, False, dtype, CHUNK, TILE, LEVELS, PRECISION)
            dk *= _fade(exact[None, :] - summed)
            dk += _halved_sum(asked_by, q, summed, True, dtype, CHUNK, TILE, LEVELS, PRECISION)
            change = k * dk - q * dq
        store_rows(dq_ptr, scale * dq + own[:, None] * k, start, head, HEADS, K, rows, keys, valid)
        store_rows(dk_ptr, scale * dk + own[:, None] * q, start, head, HEADS, K, rows, keys, valid)
        d_decay = scale * (crossing[None, :] + _summed_before(change, later, dtype, PRECISION))
        store_rows(d_decay_ptr, d_decay, start, head, HEADS, K, rows, keys, valid)


@triton.jit
def gradients_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, decay_ptr, reads_ptr, writes_ptr, kept_ptr, states_ptr, d_states_ptr, dq_ptr, dk_ptr,
    d_decay_ptr, totals_ptr, fades_ptr, borders_ptr, borders_stride, num_units, num_programs, scale, HEADS: tl.constexpr,
    K_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    LEVELS: tl.constexpr, MILD: tl.constexpr, LIMIT: tl.constexpr, IN_FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All is linear in do, and `d_states` are without the scale, so it stands outside: on what is stored. `dq` and `dk` may be
    `reads` and `writes`.

    A program takes a tile of channels of one (chunk, head) if MILD; else it looks for harsh ones among many.
    """
    program = tl.program_id(0)
    if MILD:
        _chunk_gradients(
            q_ptr, k_ptr, v_ptr, do_ptr, decay_ptr, reads_ptr, writes_ptr, kept_ptr, states_ptr, d_states_ptr, dq_ptr, dk_ptr,
            d_decay_ptr, totals_ptr, fades_ptr, borders_ptr, borders_stride, scale, program, HEADS, K_HEADS, K, V, CHUNK,
            COLUMNS, TILE, LEVELS, MILD, LIMIT, IN_FULL, PRECISION,
        )  # fmt: skip
    else:
        TILES: tl.constexpr = (K + TILE - 1) // TILE
        if _some_fade_harshly(fades_ptr, program, num_units, num_programs, TILES, LIMIT):
            for step in range(tl.cdiv(num_units - program, num_programs)):
                _chunk_gradients(
                    q_ptr, k_ptr, v_ptr, do_ptr, decay_ptr, reads_ptr, writes_ptr, kept_ptr, states_ptr, d_states_ptr, dq_ptr,
                    dk_ptr, d_decay_ptr, totals_ptr, fades_ptr, borders_ptr, borders_stride, scale,
                    program + step * num_programs, HEADS, K_HEADS, K, V, CHUNK, COLUMNS, TILE, LEVELS, MILD, LIMIT, IN_FULL,
                    PRECISION,
                )  # fmt: skip
