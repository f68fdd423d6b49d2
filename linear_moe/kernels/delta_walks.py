"""Kernels of the delta rule with a scalar decay or none: S' = a S_{t-1}; S_t = S' + b k (v - S'^T k)^T; o_t = scale q_t^T S_t.

With r_t = v_t - S'^T k_t what a write finds wrong and u_t = b_t r_t what it writes, the recurrence is the scalar scan of u,
and so are its gradients for q and k. What the erase adds is that r depends on itself: in a chunk that starts from S_0,

    x = v - e^G k S_0,   r = x - E (b x),   o = e^G q S_0 + R (b x),   E = A X,   R = P X,   X = (I + diag(b) A)^-1,
    A_tj = <k_t, k_j> e^(G_t - G_j) for j < t,   P_tj = <q_t, k_j> e^(G_t - G_j) for j <= t

(2412.06464, section 3.3, solved for r rather than u: nothing is divided by b, which may be 0). R reads what the chunk was to
write, where P would read what it wrote. Of keys nearly parallel the writes each take back the last one's, and in P u their
roundings would add up; backwards P^T do would sum what all later tokens read, of which the erases leave a small rest. R's
numbers are that rest. And nothing that R reads waits for E. Of narrow heads, whose other tensors are no larger, E and R are
kept as one matrix, R - E^T, a triangle each; else apart, as tensor cores read them from shared memory, with no masks.

    solve        chunk-parallel: E and R
    forward      forwards, a tile of value channels: r and o, from the state S [K, tile] in registers
    values       backwards, likewise: dw = du - E^T (b du) + R^T do with du = dS^T k, dv = b dw, and b's gradient <dw, r>
    gradients    chunk-parallel, a tile of key channels, from the states that the walks stored, with which
                 dq_t = S_t do_t, and dk_t is the write's dS_t u_t less the erase's S'_t dv_t

The decay's gradient is made of sums that the last leaves behind (`linear_moe.kernels.decay_gradient`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from linear_moe.kernels.blocks import (
    NO_DECAY,
    decay_between,
    decay_of,
    decay_where,
    folded_offsets,
    load_numbers,
    load_rows,
    load_start,
    part_of,
    piece_of,
    product,
    rows_left,
    state_offsets,
    store_rows,
    sum_dtype,
    sum_of_products,
    summed_decays,
    walk_at,
)
from linear_moe.kernels.delta_along_keys import STRONG, along_key, products_with_found, rest_along_key


@triton.jit
def _own_blocks(COUNT: tl.constexpr):
    """Of blocks `[COUNT, *, COUNT, *]` those on the diagonal."""
    block = tl.arange(0, COUNT)
    return (block[:, None] == block[None, :])[:, None, :, None]


@triton.jit
def _diagonal_blocks(x, BLOCK: tl.constexpr):
    """Of a matrix `[SIZE, SIZE]` the blocks on its diagonal: `[SIZE // BLOCK, BLOCK, BLOCK]`."""
    COUNT: tl.constexpr = x.shape[0] // BLOCK
    by_block = tl.reshape(x, (COUNT, BLOCK, COUNT, BLOCK))
    return tl.sum(tl.where(_own_blocks(COUNT), by_block, 0.0), 2)


@triton.jit
def _on_diagonal(blocks):
    """The matrix that has nothing but these blocks."""
    COUNT: tl.constexpr = blocks.shape[0]
    SIZE: tl.constexpr = COUNT * blocks.shape[1]
    return tl.reshape(tl.where(_own_blocks(COUNT), blocks[:, :, None, :], 0.0), (SIZE, SIZE))


@triton.jit
def _evens_first(x, DIM: tl.constexpr):
    """Rows (DIM -2) or columns (DIM -1) of `[..., R, C]` in another order: of every eight 0, 2, 4, 6, then 1, 3, 5, 7."""
    R: tl.constexpr = x.shape[-2]
    C: tl.constexpr = x.shape[-1]
    # A matrix is a stack of one.
    stack = tl.reshape(x, (x.numel // (R * C), R, C))
    if DIM == -1:
        stack = tl.permute(tl.reshape(stack, (stack.shape[0], R, C // 8, 4, 2)), (0, 1, 2, 4, 3))
    else:
        stack = tl.permute(tl.reshape(stack, (stack.shape[0], R // 8, 4, 2, C)), (0, 1, 3, 2, 4))
    return tl.reshape(stack, x.shape)


@triton.jit
def _product(x, y, PRECISION: tl.constexpr):
    """The product of float32 matrices that products left in registers.

    There a thread has columns 2 i and 2 i + 1 of every eight; of the left factor of a tf32 product it is to have i and i + 4.
    In this order of what is summed over it has them: no threads exchange any.
    """
    if PRECISION != "ieee":
        x = _evens_first(x, -1)
        y = _evens_first(y, -2)
    return tl.dot(x, y, input_precision=PRECISION, out_dtype=x.dtype)


@triton.jit
def _joined(lower, weights, inverse, row, column, FIRST: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr):
    """`inverse` of I + weights lower, of blocks of 2^FIRST rows, doubled to 2^LAST."""
    for level in tl.static_range(FIRST, LAST):
        joins = (row // (2 << level) == column // (2 << level)) & (row // (1 << level) != column // (1 << level))
        step = weights * _product(tl.where(joins, lower, 0.0), inverse, PRECISION)
        inverse -= _product(inverse, step, PRECISION)
    return inverse


@triton.jit
def _store_state(
    states_ptr, state, is_due, first_piece_ptr, piece, chunk, head, blocks_apart, HEADS: tl.constexpr, keys, values,
    K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Of every chunk, folded, or of every larger piece, where it is due."""
    in_state = (keys < K)[:, None] & (values < V)[None, :]
    if PIECE == CHUNK:
        place = tl.load(first_piece_ptr + piece) + chunk
        at = folded_offsets(place, head, blocks_apart, HEADS, keys, values, K, CHUNK)
        tl.store(states_ptr + at, state, mask=in_state)
    elif is_due:
        place = tl.load(first_piece_ptr + piece) + chunk * CHUNK // PIECE
        tl.store(states_ptr + state_offsets(place, head, HEADS, keys, values, K, V, False), state, mask=in_state)


@triton.jit
def _inverse_of_pairs(lower, row, column):
    """Of blocks of two rows."""
    return tl.where(row == column, 1.0, tl.where((row == column + 1) & (row % 2 == 1), -lower, 0.0))


@triton.jit
def unit_lower_inverse(lower, weights, SIZE: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + diag(weights) lower)^-1 of a strictly lower triangle `[SIZE, SIZE]` and weights `[SIZE]`, float32, by doubling the
    blocks that are inverted.

    With X the inverse of the blocks of one width and L what joins two of them, the pair's inverse is X - X L X: block
    substitution, whose terms stay small where powers of the whole triangle would not (keys nearly parallel). Exact results
    take float64, in which what a product rounds away of nearly parallel keys does not matter, and it is returned so. A product
    is weighted, not the triangle: the caller needs that as it is, and of both together registers would spill.
    """
    rows = tl.arange(0, SIZE)
    if PRECISION == "ieee":
        lower = lower.to(tl.float64)
        row, column = rows[:, None], rows[None, :]
        weights = weights[:, None].to(tl.float64)
        inverse = _joined(
            lower, weights, _inverse_of_pairs(weights * lower, row, column), row, column, 1, LEVELS, PRECISION
        )
    else:
        # Products of the small blocks alone, as long as they are small: those of whole matrices are zeros for the most part.
        small = _diagonal_blocks(lower, 16)
        each = tl.arange(0, 16)
        row, column = each[None, :, None], each[None, None, :]
        few = tl.reshape(weights, (SIZE // 16, 16, 1))
        inverse = _joined(small, few, _inverse_of_pairs(few * small, row, column), row, column, 1, 4, PRECISION)
        inverse = _joined(
            lower, weights[:, None], _on_diagonal(inverse), rows[:, None], rows[None, :], 4, LEVELS, PRECISION
        )
    return inverse


@triton.jit
def _load_solved(
    ptr, first, head, num_tokens, HEADS: tl.constexpr, CHUNK: tl.constexpr, PACKED: tl.constexpr, rows, valid
):
    """-E and R `[C, C]`, as `solve_kernel` leaves them."""
    erasure = load_rows(ptr, first, head, HEADS, CHUNK, rows, rows, valid)
    if PACKED:
        reads = tl.where(rows[:, None] >= rows[None, :], erasure, 0.0)
        erasure = tl.trans(tl.where(rows[:, None] < rows[None, :], erasure, 0.0))
    else:
        reads = load_rows(ptr, num_tokens + first, head, HEADS, CHUNK, rows, rows, valid)
    return erasure, reads


@triton.jit
def _rounded_erases(erases, writes, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """-E or -E diag(b) as it is kept, with `writes` -E diag(b). As it is before it is transposed: a tile of half the size.

    What rounding adds to a token's erase the next ones take back, as they do what is written there: of keys nearly parallel it
    would stay.
    """
    added = erases.to(dtype).to(erases.dtype) - erases
    return (erases + tl.dot(writes.to(dtype), added.to(dtype), input_precision=PRECISION)).to(dtype)


@triton.jit
def _store_short(ptr, x, first, head, HEADS: tl.constexpr, SHORT: tl.constexpr, rows, valid):
    """Of a chunk's matrix the blocks on its diagonal, `[*, HEADS, SHORT]`."""
    at = ((first + rows) * HEADS + head)[:, None] * SHORT + (rows % SHORT)[None, :]
    tl.store(ptr + at, x, mask=valid[:, None] & (rows[:, None] // SHORT == rows[None, :] // SHORT))


@triton.jit
def solve_kernel(
    q_ptr,
    k_ptr,
    decay_ptr,
    beta_ptr,
    solved_ptr,
    short_ptr,
    apart_ptr,
    along_ptr,
    borders_ptr,
    borders_stride,
    num_tokens,
    scale,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    PIECE: tl.constexpr,
    CHUNK: tl.constexpr,
    SHORT: tl.constexpr,
    LEVELS: tl.constexpr,
    K_BLOCK: tl.constexpr,
    DECAY: tl.constexpr,
    IN_FULL: tl.constexpr,
    PACKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`solved`: -E of all tokens, then R of all tokens; without q, -E alone. PACKED: R - E^T, a triangle each.
    WEIGHTED: -E diag(b), then scale R diag(b). `short` `[2, S, HEADS, SHORT]`: these of chunks of SHORT tokens, which are the
    blocks on the diagonals.

    `apart` `[S, HEADS, K]`: what a query has that its own key has not, q - a k. `along` `[2, HEADS, S]`: a and a (1 - b |k|^2).
    Null pointers leave them out.
    """
    program = tl.program_id(0)
    head = program % HEADS
    start, size = part_of(borders_ptr, borders_stride, (program // HEADS).to(tl.int64), PIECE, CHUNK)
    if size == 0:
        return
    k_head = head // (HEADS // K_HEADS)
    rows = tl.arange(0, CHUNK)
    keys = tl.arange(0, K_BLOCK)
    num_rows = rows_left(size, 0, CHUNK, IN_FULL)
    valid = rows < num_rows
    k = load_rows(k_ptr, start, k_head, K_HEADS, K, rows, keys, valid)
    beta = tl.load(beta_ptr + head.to(tl.int64) * num_tokens + start + rows, mask=valid, other=0.0)
    earlier = rows[:, None] > rows[None, :]
    overlaps = tl.dot(k, tl.trans(k), input_precision=PRECISION)
    if along_ptr is not None:
        itself = rows[:, None] == rows[None, :]
        squares = tl.sum(tl.where(itself, overlaps, 0.0), 1)
    if DECAY != NO_DECAY:
        summed, _ = summed_decays(decay_ptr, 0.0, head, start, rows, num_rows, num_tokens, DECAY)
        overlaps *= decay_where(earlier, summed[:, None], summed[None, :])
    else:
        overlaps = tl.where(earlier, overlaps, 0.0)
    inverse = unit_lower_inverse(overlaps, beta, CHUNK, LEVELS, PRECISION)
    solved = -_product(overlaps.to(inverse.dtype), inverse, PRECISION)
    writes = solved * beta[None, :]
    if WEIGHTED:
        solved = writes
    solved = _rounded_erases(solved, writes, k.dtype, PRECISION)
    if short_ptr is not None:
        short = _rounded_erases(writes, writes, k.dtype, PRECISION)
        _store_short(short_ptr, short, start, head, HEADS, SHORT, rows, valid)
    if not PACKED:
        store_rows(solved_ptr, solved, start, head, HEADS, CHUNK, rows, rows, valid)
    if q_ptr is not None:
        q = load_rows(q_ptr, start, k_head, K_HEADS, K, rows, keys, valid)
        seen = rows[:, None] >= rows[None, :]
        reads = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if along_ptr is not None:
            along = along_key(tl.sum(tl.where(itself, reads, 0.0), 1), squares, beta, rows)
            numbers = along_ptr + start + rows
            tl.store(numbers + head.to(tl.int64) * num_tokens, along, mask=valid)
            tl.store(numbers + (HEADS + head).to(tl.int64) * num_tokens, along * (1.0 - beta * squares), mask=valid)
        if DECAY != NO_DECAY:
            reads *= decay_where(seen, summed[:, None], summed[None, :])
        else:
            reads = tl.where(seen, reads, 0.0)
        reads = _product(reads.to(inverse.dtype), inverse, PRECISION)
        if short_ptr is not None:
            short = (scale * reads * beta[None, :]).to(k.dtype)
            _store_short(short_ptr, short, num_tokens + start, head, HEADS, SHORT, rows, valid)
        if WEIGHTED:
            reads *= scale * beta[None, :]
        if PACKED:
            solved = tl.where(seen, reads.to(k.dtype), tl.trans(solved))
            store_rows(solved_ptr, solved, start, head, HEADS, CHUNK, rows, rows, valid)
        else:
            store_rows(solved_ptr, reads, num_tokens + start, head, HEADS, CHUNK, rows, rows, valid)
        if along_ptr is not None:
            for first in range(0, K, 64):
                some = first + tl.arange(0, 64)
                key = load_rows(k_ptr, start, k_head, K_HEADS, K, rows, some, valid).to(tl.float32)
                query = load_rows(q_ptr, start, k_head, K_HEADS, K, rows, some, valid).to(tl.float32)
                store_rows(apart_ptr, query - along[:, None] * key, start, head, HEADS, K, rows, some, valid)


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    decay_ptr,
    beta_ptr,
    solved_ptr,
    o_ptr,
    wrong_ptr,
    initial_ptr,
    joined_ptr,
    owner_ptr,
    first_ptr,
    final_ptr,
    states_ptr,
    first_piece_ptr,
    borders_ptr,
    borders_stride,
    order_ptr,
    blocks_apart,
    num_tokens,
    scale,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    K_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DECAY: tl.constexpr,
    IN_FULL: tl.constexpr,
    THREADS: tl.constexpr,
    PACKED: tl.constexpr,
    TRANSITION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A null pointer leaves its part out. `states`: of the state before each PIECE tokens.
    TRANSITION: no values and a start of I, whose final state is what the piece does to any state `[K, K]`.
    """
    NUM_TILES: tl.constexpr = (V + TILE - 1) // TILE
    tile, head, piece, start, size = walk_at(order_ptr, borders_ptr, borders_stride, HEADS, NUM_TILES)
    # A final state alone, or what the piece does to any, is for what comes after: of a piece that was emptied nothing does.
    if (o_ptr is None) and (wrong_ptr is None):
        if size == 0:
            return
    k_head = head // (HEADS // K_HEADS)
    rows = tl.arange(0, CHUNK)
    keys = tl.arange(0, K_BLOCK)
    values = tile * TILE + tl.arange(0, TILE)
    dtype = k_ptr.dtype.element_ty
    state_at = state_offsets(piece, head, HEADS, keys, values, K, V, False)
    in_state = (keys < K)[:, None] & (values < V)[None, :]
    if TRANSITION:
        state = (keys[:, None] == values[None, :]).to(tl.float32)
    else:
        state = load_start(
            initial_ptr, joined_ptr, owner_ptr, first_ptr, piece, head, HEADS, keys, values, K, V, False, False
        )
    for chunk in range(tl.cdiv(size, CHUNK)):
        first = start + chunk * CHUNK
        num_rows = rows_left(size, chunk * CHUNK, CHUNK, IN_FULL)
        valid = rows < num_rows
        k = load_rows(k_ptr, first, k_head, K_HEADS, K, rows, keys, valid)
        erasure, reads = _load_solved(solved_ptr, first, head, num_tokens, HEADS, CHUNK, PACKED, rows, valid)
        beta = load_numbers(beta_ptr + head.to(tl.int64) * num_tokens + first, rows, valid, THREADS)[:, None]
        rounded = state.to(dtype)
        if states_ptr is not None:
            is_due = chunk * CHUNK % PIECE == 0
            _store_state(states_ptr, rounded, is_due, first_piece_ptr, piece, chunk, head, blocks_apart, HEADS, keys, values,
                         K, V, CHUNK, PIECE)  # fmt: skip
        wrong = -tl.dot(k, rounded, input_precision=PRECISION)
        if DECAY != NO_DECAY:
            summed, total = summed_decays(decay_ptr, 0.0, head, first, rows, num_rows, num_tokens, DECAY, THREADS)
            from_start = decay_of(summed)[:, None]
            to_end = decay_between(total, summed)[:, None]
            wrong *= from_start
        if not TRANSITION:
            wrong += load_rows(v_ptr, first, head, HEADS, V, rows, values, valid).to(tl.float32)
        # What rounding b x adds is added to x, or E would leave it over, where of keys nearly parallel little else is left.
        exact = beta * wrong
        crossing = exact.to(dtype)
        wrong += crossing.to(tl.float32) - exact
        wrong = tl.dot(erasure, crossing, acc=wrong, input_precision=PRECISION)
        written = beta * wrong
        if wrong_ptr is not None:
            store_rows(wrong_ptr, wrong, first, head, HEADS, V, rows, values, valid)
        if o_ptr is not None:
            q = load_rows(q_ptr, first, k_head, K_HEADS, K, rows, keys, valid)
            o = tl.dot(q, rounded, input_precision=PRECISION)
            if DECAY != NO_DECAY:
                o *= from_start
            o = tl.dot(reads, crossing, acc=o, input_precision=PRECISION)
            store_rows(o_ptr, scale * o, first, head, HEADS, V, rows, values, valid)
        if DECAY != NO_DECAY:
            state *= decay_of(total)
            written *= to_end
        state = sum_of_products(tl.trans(k), written, state, PRECISION).to(tl.float32)
        if wrong_ptr is not None and K <= 64 and dtype != tl.float32:
            # What rounding takes from a chunk's writes: of keys nearly parallel it adds up, and is much of a state of few keys.
            rest = (written - written.to(dtype).to(tl.float32)).to(dtype)
            state = tl.dot(tl.trans(k), rest, acc=state, input_precision=PRECISION)
    if final_ptr is not None:
        tl.store(final_ptr + state_at, state, mask=in_state)


@triton.jit
def values_kernel(
    q_ptr,
    k_ptr,
    do_ptr,
    wrong_ptr,
    decay_ptr,
    beta_ptr,
    solved_ptr,
    dv_ptr,
    dbeta_ptr,
    initial_ptr,
    joined_ptr,
    owner_ptr,
    first_ptr,
    final_ptr,
    states_ptr,
    first_piece_ptr,
    borders_ptr,
    borders_stride,
    order_ptr,
    blocks_apart,
    num_tokens,
    scale,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    K_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    DECAY: tl.constexpr,
    IN_FULL: tl.constexpr,
    THREADS: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`initial` is the gradient of the piece's last state, `final` that of its first; without `dv`, states alone.
    `states`: of the gradient after each PIECE tokens, without the scale.

    The walk is linear in `do` and its start, so `scale` stands outside it.
    """
    NUM_TILES: tl.constexpr = (V + TILE - 1) // TILE
    tile, head, piece, start, size = walk_at(order_ptr, borders_ptr, borders_stride, HEADS, NUM_TILES)
    if dv_ptr is None:
        if size == 0:
            return
    k_head = head // (HEADS // K_HEADS)
    rows = tl.arange(0, CHUNK)
    keys = tl.arange(0, K_BLOCK)
    values = tile * TILE + tl.arange(0, TILE)
    dtype = k_ptr.dtype.element_ty
    state_at = state_offsets(piece, head, HEADS, keys, values, K, V, False)
    in_state = (keys < K)[:, None] & (values < V)[None, :]
    state = load_start(
        initial_ptr, joined_ptr, owner_ptr, first_ptr, piece, head, HEADS, keys, values, K, V, False, True
    )  # fmt: skip
    state /= scale
    num_chunks = tl.cdiv(size, CHUNK)
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step
        first = start + chunk * CHUNK
        num_rows = rows_left(size, chunk * CHUNK, CHUNK, IN_FULL)
        valid = rows < num_rows
        k = load_rows(k_ptr, first, k_head, K_HEADS, K, rows, keys, valid)
        q = load_rows(q_ptr, first, k_head, K_HEADS, K, rows, keys, valid)
        do = load_rows(do_ptr, first, head, HEADS, V, rows, values, valid)
        if dv_ptr is not None:
            # Before the products: a tile that is loaded after them would draw the sum with it to its own layout.
            wrong = load_rows(wrong_ptr, first, head, HEADS, V, rows, values, valid)
        erasure, reads = _load_solved(solved_ptr, first, head, num_tokens, HEADS, CHUNK, PACKED, rows, valid)
        beta = load_numbers(beta_ptr + head.to(tl.int64) * num_tokens + first, rows, valid, THREADS)[:, None]
        rounded = state.to(dtype)
        if states_ptr is not None:
            end = (chunk + 1) * CHUNK
            is_due = (end % PIECE == 0) | (end >= size)
            _store_state(states_ptr, rounded, is_due, first_piece_ptr, piece, chunk, head, blocks_apart, HEADS, keys, values,
                         K, V, CHUNK, PIECE)  # fmt: skip
        d_write = tl.dot(k, rounded, input_precision=PRECISION)
        read = do
        if DECAY != NO_DECAY:
            summed, total = summed_decays(decay_ptr, 0.0, head, first, rows, num_rows, num_tokens, DECAY, THREADS)
            from_start = decay_of(summed)[:, None]
            d_write *= decay_between(total, summed)[:, None]
            state *= decay_of(total)
            read = do.to(tl.float32) * from_start
        # Before the products that wait for each other: it waits for none of them.
        state = sum_of_products(tl.trans(q), read, state, PRECISION)
        crossing = (beta * d_write).to(dtype)
        if dtype != tl.float32:
            # As of b x forwards, du is what E^T takes away, or what rounding adds to that would be left over.
            d_write = tl.where(beta >= STRONG, crossing.to(tl.float32) * (1.0 / tl.maximum(beta, STRONG)), d_write)
        d_write = sum_of_products(tl.trans(erasure), crossing, d_write, PRECISION)
        d_write = sum_of_products(tl.trans(reads), do, d_write, PRECISION).to(tl.float32)
        dv = beta * d_write
        if dv_ptr is not None:
            at = (tile.to(tl.int64) * num_tokens + first + rows) * HEADS + head
            tl.store(dbeta_ptr + at, scale * tl.sum(d_write * wrong.to(tl.float32), 1), mask=valid)
            store_rows(dv_ptr, scale * dv, first, head, HEADS, V, rows, values, valid)
        if DECAY != NO_DECAY:
            dv *= from_start
        state = sum_of_products(tl.trans(k), -dv, state, PRECISION).to(tl.float32)
    if final_ptr is not None:
        tl.store(final_ptr + state_at, scale * state, mask=in_state)


@triton.jit
def gradients_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dv_ptr,
    wrong_ptr,
    decay_ptr,
    beta_ptr,
    states_ptr,
    ends_ptr,
    dq_ptr,
    dk_ptr,
    read_ptr,
    written_ptr,
    missed_ptr,
    borders_ptr,
    borders_stride,
    blocks_apart,
    num_tokens,
    scale,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    DECAY: tl.constexpr,
    IN_FULL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`read` and `written`: what dq, dk and a token's own pair are made of, but for that pair; null pointers without a decay.
    With `v` dq is put right along the token's own key, where a program has all keys; else `missed` is what each tile has of
    scale <do, v - r> - <dq, k>, of dq without the token's own pair.

    `dq` and `dk` may be blocks of `ends`: a program alone reads its blocks, all before it stores any.
    """
    NUM_TILES: tl.constexpr = (K + TILE - 1) // TILE
    program = tl.program_id(0)
    tile = program % NUM_TILES
    head = (program // NUM_TILES) % HEADS
    chunk = (program // (NUM_TILES * HEADS)).to(tl.int64)
    start, size = piece_of(borders_ptr, borders_stride, chunk)
    # Of an empty segment no walk has stored a state.
    if size == 0:
        return
    k_head = head // (HEADS // K_HEADS)
    rows = tl.arange(0, CHUNK)
    keys = tile * TILE + tl.arange(0, TILE)
    num_rows = rows_left(size, 0, CHUNK, IN_FULL)
    valid = rows < num_rows
    at = head.to(tl.int64) * num_tokens + start + rows
    dtype = k_ptr.dtype.element_ty
    if v_ptr is not None:
        # Of a tile's share of the values.
        known = scale * products_with_found(
            do_ptr, v_ptr, wrong_ptr, start, head, HEADS, V, rows, valid, tile * COLUMNS, NUM_TILES * COLUMNS, COLUMNS
        )
    WIDE: tl.constexpr = sum_dtype(PRECISION)
    reads, erases = tl.zeros((CHUNK, CHUNK), WIDE), tl.zeros((CHUNK, CHUNK), WIDE)
    dq, erased, dk = (tl.zeros((CHUNK, TILE), WIDE),) * 3
    for first in range(0, V, COLUMNS):
        values = first + tl.arange(0, COLUMNS)
        do = load_rows(do_ptr, start, head, HEADS, V, rows, values, valid)
        dv = load_rows(dv_ptr, start, head, HEADS, V, rows, values, valid)
        wrong = load_rows(wrong_ptr, start, head, HEADS, V, rows, values, valid)
        state_at = folded_offsets(chunk, head, blocks_apart, HEADS, keys, values, K, CHUNK)
        in_state = (keys < K)[:, None] & (values < V)[None, :]
        state = tl.load(states_ptr + state_at, mask=in_state, other=0.0)
        end = tl.load(ends_ptr + state_at, mask=in_state, other=0.0)
        reads = sum_of_products(do, tl.trans(wrong), reads, PRECISION)
        erases = sum_of_products(dv, tl.trans(wrong), erases, PRECISION)
        dq = sum_of_products(do, tl.trans(state), dq, PRECISION)
        erased = sum_of_products(dv, tl.trans(state), erased, PRECISION)
        dk = sum_of_products(wrong, tl.trans(end), dk, PRECISION)
    q = load_rows(q_ptr, start, k_head, K_HEADS, K, rows, keys, valid)
    k = load_rows(k_ptr, start, k_head, K_HEADS, K, rows, keys, valid)
    beta = tl.load(beta_ptr + at, mask=valid, other=0.0)
    # A token's own pair crosses nothing: it stands apart from the sums that the decay's gradient is made of.
    own = scale * beta * tl.sum(tl.where(rows[:, None] == rows[None, :], reads, 0.0), 1)
    earlier = rows[:, None] > rows[None, :]
    to_end = beta * scale
    from_start = tl.full((CHUNK,), 1.0, tl.float32)
    if DECAY != NO_DECAY:
        summed, total = summed_decays(decay_ptr, 0.0, head, start, rows, num_rows, num_tokens, DECAY)
        pairs = decay_where(earlier, summed[:, None], summed[None, :])
        from_start = decay_of(summed)
        to_end *= decay_between(total, summed)
    else:
        pairs = tl.where(earlier, 1.0, 0.0)
    # What is written is u = b r.
    pairs *= beta[None, :]
    exact = scale * pairs * reads
    reads = exact.to(dtype)
    along = tl.zeros((CHUNK,), tl.float32)
    if DECAY != NO_DECAY:
        # What rounding takes from pairs goes to the token's own, whose key is nearly theirs where it would add up. Without a
        # decay all that is along the key is put right anyway (`linear_moe.kernels.delta_along_keys`).
        along += tl.sum(exact, 1) - tl.sum(reads.to(tl.float32), 1)
    erases = (pairs * erases).to(dtype)
    dq = sum_of_products(reads, k, (scale * from_start)[:, None] * dq, PRECISION)
    erased = sum_of_products(erases, k, from_start[:, None] * erased, PRECISION)
    key = k.to(tl.float32)
    if read_ptr is not None:
        overlap = tl.sum(q.to(tl.float32) * dq, 1) - tl.sum(key * erased, 1)
        tl.store(read_ptr + tile.to(tl.int64) * HEADS * num_tokens + at, overlap, mask=valid)
    if v_ptr is not None:
        squares = tl.sum(key * key, 1)
        missed = known - tl.sum(key * dq, 1) - along * squares
        if NUM_TILES == 1:
            along += rest_along_key(missed, squares, beta)
        else:
            tl.store(missed_ptr + tile.to(tl.int64) * HEADS * num_tokens + at, missed, mask=valid)
    store_rows(dq_ptr, dq + (own + along)[:, None] * key, start, head, HEADS, K, rows, keys, valid)
    dk = sum_of_products(tl.trans(reads), q, to_end[:, None] * dk, PRECISION)
    dk = dk - product(tl.trans(erases), k, PRECISION)
    if written_ptr is not None:
        overlap = tl.sum(key * dk, 1)
        tl.store(written_ptr + tile.to(tl.int64) * HEADS * num_tokens + at, overlap, mask=valid)
    store_rows(dk_ptr, dk - erased + own[:, None] * q.to(tl.float32), start, head, HEADS, K, rows, keys, valid)
