"""Kernels of a decay a key channel, without erase: S_t = Diag(a_t) S_{t-1} + k_t v_t^T; o_t = scale q_t^T S_t.

With G the sum of a chunk's log decays, a chunk that starts from S_0 reads and leaves (2312.06635, section 4)

    o_t = scale ((q_t e^G_t) S_0 + sum_{j <= t} P_tj v_j),   P_tj = sum_c q_tc k_jc e^(G_tc - G_jc)
    S_C = Diag(e^G_C) S_0 + sum_j (k_j e^(G_C - G_j)) v_j^T

The exponentials are the cost, so each is made once a token and channel, never once a tile of values. Four kernels:

    prepare      chunk-parallel: q e^G, k e^(G_C - G), P, and G_C
    walk         the state-resident scan over these: o forwards in time; backwards, with roles exchanged, dv
    keys         backwards, a tile of key channels, state dS^T: dk, and k dk for the decay's gradient
    queries      forwards, likewise, state S^T: dq, and a channel's decay gradient, <S_0, dS_0> + sum_{i < t} (k dk - q dq)_i,
                 where a token's own pair is in neither (`linear_moe.kernels.decay_gradient` says why)

A chunk in which no channel fades by more than e^LIMIT is multiplied out around half of its fading; any other by halves of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linear_moe.kernels.blocks import load_columns, load_rows, piece_at, piece_of, state_offsets, store_rows

FADES_BLOCK = tl.constexpr(64)


@triton.jit
def _fades_mildly(fades_ptr, first_chunk, num_chunks, head, HEADS: tl.constexpr, LIMIT: tl.constexpr):
    """Whether no channel of a head fades by more than is safe to undo in any of some chunks."""
    worst = 0.0
    for start in range(0, num_chunks, FADES_BLOCK):
        chunk = start + tl.arange(0, FADES_BLOCK)
        fades = tl.load(fades_ptr + (first_chunk + chunk) * HEADS + head, mask=chunk < num_chunks, other=0.0)
        worst = tl.maximum(worst, tl.max(fades, 0))
    return worst < LIMIT


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
    return tl.exp(tl.minimum(difference, 0.0).to(tl.float32))


@triton.jit
def _around_middle(summed, total):
    """Of a mild chunk, with m = G_C / 2: e^(G - m), e^(m - G), and e^m = e^(G_C - m). All its factors are products of these."""
    middle = 0.5 * total
    difference = (summed - middle[None, :]).to(tl.float32)
    return tl.exp(difference), tl.exp(-difference), tl.exp(middle.to(tl.float32))[None, :]


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
    """G and G_C of some channels of a chunk."""
    each = load_rows(decay_ptr, first, head, HEADS, K, rows, keys, valid)
    if EXACT:
        each = each.to(tl.float64)
    return tl.cumsum(each, 0), tl.sum(each, 0)


@triton.jit
def prepare_kernel(
    q_ptr,
    k_ptr,
    decay_ptr,
    reads_ptr,
    writes_ptr,
    products_ptr,
    totals_ptr,
    fades_ptr,
    borders_ptr,
    borders_stride,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    LEVELS: tl.constexpr,
    MILD: tl.constexpr,
    LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    EXACT: tl.constexpr = PRECISION == "ieee"
    program = tl.program_id(0)
    head = program % HEADS
    chunk = (program // HEADS).to(tl.int64)
    start, size = piece_of(borders_ptr, borders_stride, chunk)
    k_head = head // (HEADS // K_HEADS)
    rows = tl.arange(0, CHUNK)
    valid = rows < size
    if MILD:
        worst = 0.0
        for key in tl.static_range(0, K, TILE):
            each = load_rows(decay_ptr, start, head, HEADS, K, rows, key + tl.arange(0, TILE), valid)
            worst = tl.maximum(worst, -tl.min(tl.sum(each, 0), 0))
        tl.store(fades_ptr + chunk * HEADS + head, worst)
        # A NaN is not mild, so that it gets where it belongs.
        mine = worst < LIMIT
    else:
        mine = not _fades_mildly(fades_ptr, chunk, 1, head, HEADS, LIMIT)
    if not mine:
        return
    dtype = k_ptr.dtype.element_ty
    products = tl.zeros((CHUNK, CHUNK), tl.float32)
    own = tl.zeros((CHUNK,), tl.float32)
    for key in tl.static_range(0, K, TILE):
        keys = key + tl.arange(0, TILE)
        q = load_rows(q_ptr, start, k_head, K_HEADS, K, rows, keys, valid).to(tl.float32)
        k = load_rows(k_ptr, start, k_head, K_HEADS, K, rows, keys, valid).to(tl.float32)
        summed, total = _sums(decay_ptr, start, head, HEADS, K, rows, keys, valid, EXACT)
        if MILD:
            up, down, half = _around_middle(summed, total)
            q_up, k_down = q * up, k * down
            reads, writes = q_up * half, k_down * half
            met = tl.dot(q_up.to(dtype), tl.trans(k_down.to(dtype)), input_precision=PRECISION)
            products += tl.where(rows[:, None] > rows[None, :], met, 0.0)
        else:
            reads, writes = q * _fade(summed), k * _fade(total[None, :] - summed)
            products += _halved_products(q, k, summed, dtype, CHUNK, TILE, LEVELS, PRECISION)
        store_rows(reads_ptr, reads, start, head, HEADS, K, rows, keys, valid)
        store_rows(writes_ptr, writes, start, head, HEADS, K, rows, keys, valid)
        tl.store(totals_ptr + (chunk * HEADS + head) * K + keys, total.to(tl.float32), mask=keys < K)
        own += tl.sum(q * k, 1)
    products = tl.where(rows[:, None] == rows[None, :], own[:, None], products)
    store_rows(products_ptr, products, start, head, HEADS, CHUNK, rows, rows, valid)


@triton.jit
def walk_kernel(
    reads_ptr,
    writes_ptr,
    v_ptr,
    products_ptr,
    totals_ptr,
    chunks_ptr,
    o_ptr,
    initial_ptr,
    final_ptr,
    piece_totals_ptr,
    borders_ptr,
    borders_stride,
    order_ptr,
    scale,
    state_scale,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A null pointer leaves its part out. A scale on what is written stands outside the walk, which is linear in its start and
    in v: on the reads, and on the initial and final state.
    """
    NUM_TILES: tl.constexpr = (V + TILE - 1) // TILE
    program = tl.program_id(0)
    tile = program % NUM_TILES
    head = (program // NUM_TILES) % HEADS
    piece = piece_at(order_ptr, program // (NUM_TILES * HEADS))
    start, size = piece_of(borders_ptr, borders_stride, piece)
    first_chunk = tl.load(chunks_ptr + piece)
    rows = tl.arange(0, CHUNK)
    keys = tl.arange(0, K_BLOCK)
    values = tile * TILE + tl.arange(0, TILE)
    dtype = v_ptr.dtype.element_ty
    state_at = state_offsets(piece, head, HEADS, keys, values, K, V, False)
    in_state = (keys < K)[:, None] & (values < V)[None, :]
    if initial_ptr is not None:
        state = tl.load(initial_ptr + state_at, mask=in_state, other=0.0) / state_scale
    else:
        state = tl.zeros((K_BLOCK, TILE), tl.float32)
    if piece_totals_ptr is not None:
        all_decay = tl.zeros((K_BLOCK,), tl.float32)
    num_chunks = tl.cdiv(size, CHUNK)
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step if REVERSE else step
        first = start + chunk * CHUNK
        valid = rows < size - chunk * CHUNK
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
        state *= tl.exp(total)[:, None]
        state = tl.dot(tl.trans(writes), v, acc=state, input_precision=PRECISION)
    if final_ptr is not None:
        tl.store(final_ptr + state_at, state_scale * state, mask=in_state)
    if piece_totals_ptr is not None:
        if tile == 0:
            tl.store(piece_totals_ptr + (piece * HEADS + head) * K + keys, all_decay, mask=keys < K)


@triton.jit
def keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    decay_ptr,
    dk_ptr,
    written_ptr,
    initial_ptr,
    fades_ptr,
    chunks_ptr,
    borders_ptr,
    borders_stride,
    order_ptr,
    scale,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    LEVELS: tl.constexpr,
    MILD: tl.constexpr,
    LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    EXACT: tl.constexpr = PRECISION == "ieee"
    NUM_TILES: tl.constexpr = (K + TILE - 1) // TILE
    program = tl.program_id(0)
    tile = program % NUM_TILES
    head = (program // NUM_TILES) % HEADS
    piece = piece_at(order_ptr, program // (NUM_TILES * HEADS))
    start, size = piece_of(borders_ptr, borders_stride, piece)
    num_chunks = tl.cdiv(size, CHUNK)
    if _fades_mildly(fades_ptr, tl.load(chunks_ptr + piece), num_chunks, head, HEADS, LIMIT) != MILD:
        return
    k_head = head // (HEADS // K_HEADS)
    rows = tl.arange(0, CHUNK)
    values = tl.arange(0, V_BLOCK)
    keys = tile * TILE + tl.arange(0, TILE)
    dtype = v_ptr.dtype.element_ty
    if initial_ptr is not None:
        state_at = state_offsets(piece, head, HEADS, values, keys, V, K, True)
        state = tl.load(initial_ptr + state_at, mask=(values < V)[:, None] & (keys < K)[None, :], other=0.0)
    else:
        state = tl.zeros((V_BLOCK, TILE), tl.float32)
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step
        first = start + chunk * CHUNK
        valid = rows < size - chunk * CHUNK
        v = load_rows(v_ptr, first, head, HEADS, V, rows, values, valid)
        do = load_rows(do_ptr, first, head, HEADS, V, rows, values, valid)
        q = scale * load_rows(q_ptr, first, k_head, K_HEADS, K, rows, keys, valid).to(tl.float32)
        k = load_rows(k_ptr, first, k_head, K_HEADS, K, rows, keys, valid).to(tl.float32)
        summed, total = _sums(decay_ptr, first, head, HEADS, K, rows, keys, valid, EXACT)
        pairs = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        own = tl.sum(tl.where(rows[:, None] == rows[None, :], pairs, 0.0), 1)
        if MILD:
            up, down, half = _around_middle(summed, total)
            near = tl.where(rows[:, None] < rows[None, :], pairs, 0.0).to(dtype)
            asked = (q * up).to(dtype)
            state *= half
            dk = tl.dot(v, state.to(dtype), input_precision=PRECISION)
            dk = down * tl.dot(near, asked, acc=dk, input_precision=PRECISION)
            state = half * tl.dot(tl.trans(do), asked, acc=state, input_precision=PRECISION)
        else:
            dk = tl.dot(v, state.to(dtype), input_precision=PRECISION) * _fade(total[None, :] - summed)
            dk += _halved_sum(pairs, q, summed, True, dtype, CHUNK, TILE, LEVELS, PRECISION)
            state *= tl.exp(total.to(tl.float32))[None, :]
            state = tl.dot(tl.trans(do), (q * _fade(summed)).to(dtype), acc=state, input_precision=PRECISION)
        store_rows(written_ptr, k * dk, first, head, HEADS, K, rows, keys, valid)
        store_rows(dk_ptr, dk + own[:, None] * q, first, head, HEADS, K, rows, keys, valid)


@triton.jit
def queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    decay_ptr,
    written_ptr,
    dq_ptr,
    ddecay_ptr,
    initial_ptr,
    at_start_ptr,
    fades_ptr,
    chunks_ptr,
    borders_ptr,
    borders_stride,
    order_ptr,
    scale,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    LEVELS: tl.constexpr,
    MILD: tl.constexpr,
    LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    EXACT: tl.constexpr = PRECISION == "ieee"
    NUM_TILES: tl.constexpr = (K + TILE - 1) // TILE
    program = tl.program_id(0)
    tile = program % NUM_TILES
    head = (program // NUM_TILES) % HEADS
    piece = piece_at(order_ptr, program // (NUM_TILES * HEADS))
    start, size = piece_of(borders_ptr, borders_stride, piece)
    num_chunks = tl.cdiv(size, CHUNK)
    if _fades_mildly(fades_ptr, tl.load(chunks_ptr + piece), num_chunks, head, HEADS, LIMIT) != MILD:
        return
    k_head = head // (HEADS // K_HEADS)
    rows = tl.arange(0, CHUNK)
    values = tl.arange(0, V_BLOCK)
    keys = tile * TILE + tl.arange(0, TILE)
    dtype = v_ptr.dtype.element_ty
    # What crosses the next token. Summed in float64 where results are float32, as the decays are.
    SUM_DTYPE: tl.constexpr = tl.float64 if EXACT else tl.float32
    crossing = tl.zeros((TILE,), SUM_DTYPE)
    if initial_ptr is not None:
        state_at = state_offsets(piece, head, HEADS, values, keys, V, K, True)
        state = tl.load(initial_ptr + state_at, mask=(values < V)[:, None] & (keys < K)[None, :], other=0.0)
        crossing += tl.load(at_start_ptr + (piece * HEADS + head) * K + keys, mask=keys < K, other=0.0).to(SUM_DTYPE)
    else:
        state = tl.zeros((V_BLOCK, TILE), tl.float32)
    for chunk in range(num_chunks):
        first = start + chunk * CHUNK
        valid = rows < size - chunk * CHUNK
        v = load_rows(v_ptr, first, head, HEADS, V, rows, values, valid)
        do = load_rows(do_ptr, first, head, HEADS, V, rows, values, valid)
        q = load_rows(q_ptr, first, k_head, K_HEADS, K, rows, keys, valid).to(tl.float32)
        k = load_rows(k_ptr, first, k_head, K_HEADS, K, rows, keys, valid).to(tl.float32)
        summed, total = _sums(decay_ptr, first, head, HEADS, K, rows, keys, valid, EXACT)
        pairs = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        own = tl.sum(tl.where(rows[:, None] == rows[None, :], pairs, 0.0), 1)
        if MILD:
            up, down, half = _around_middle(summed, total)
            near = tl.where(rows[:, None] > rows[None, :], pairs, 0.0).to(dtype)
            kept = (k * down).to(dtype)
            state *= half
            dq = tl.dot(do, state.to(dtype), input_precision=PRECISION)
            dq = up * tl.dot(near, kept, acc=dq, input_precision=PRECISION)
            state = half * tl.dot(tl.trans(v), kept, acc=state, input_precision=PRECISION)
        else:
            dq = tl.dot(do, state.to(dtype), input_precision=PRECISION) * _fade(summed)
            dq += _halved_sum(pairs, k, summed, False, dtype, CHUNK, TILE, LEVELS, PRECISION)
            state *= tl.exp(total.to(tl.float32))[None, :]
            keep = (k * _fade(total[None, :] - summed)).to(dtype)
            state = tl.dot(tl.trans(v), keep, acc=state, input_precision=PRECISION)
        dq *= scale
        written = load_rows(written_ptr, first, head, HEADS, K, rows, keys, valid).to(tl.float32)
        change = (written - q * dq).to(SUM_DTYPE)
        store_rows(
            ddecay_ptr, crossing[None, :] + tl.cumsum(change, 0) - change, first, head, HEADS, K, rows, keys, valid
        )
        crossing += tl.sum(change, 0)
        store_rows(dq_ptr, dq + (scale * own)[:, None] * k, first, head, HEADS, K, rows, keys, valid)
