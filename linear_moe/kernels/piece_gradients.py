"""Gradients of scans that store states: sums of reads from the states before each piece, and from their gradients after it.

With S_0 the state before a piece, dS the gradient of the one after it without the scale, and pairs as `piece_reads` has them,

    dq = scale (do read from v, k and S_0)            forwards in time
    dk = scale (v read from do, q and dS)             backwards
    dv = scale (k read from q, do and dS)             backwards

and where writes depend on what is there, r what a write finds wrong, b its strength and u = b r what it writes,

    dq = scale (do read from u, k and S_0)
    dk = b (r read from scale do, q and dS, and from -dv, k) - (dv read from u, k and S_0, without the token's own write)

without a decay with what is along a token's own key put right (`linear_moe.kernels.delta_along_keys`).

Reads that share nearly all of what they load are programs of one launch, next to each other: what the first brings from memory
the others find in the L2 cache. The delta rule's are two launches: in the second dS is no more, and dq takes its memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels import piece_reads
from linear_moe.kernels.blocks import DECAY_NAMES, NO_DECAY, load_rows, piece_of, rate_of, rows_left, store_rows
from linear_moe.kernels.delta_along_keys import rest_along_key
from linear_moe.kernels.launch import launch_kernel
from linear_moe.kernels.launch_tables import LaunchTable
from linear_moe.kernels.piece_reads import Launch, Pieces, add_pairs, begin_rows, choices, quarters, read_rows


def choose_launch(dtype: torch.dtype) -> Launch:
    """From a frozen table, measured on an H100 (torch 2.11, triton 3.6, bf16, scalar decay, H4 K = V = 256).

    The delta rule's, ms at 98,304 tokens in 40 segments, writes and reads: 0.77, 1.00; columns of 64 and 2 stages 0.82,
    1.12; 2 stages 0.89, 1.20; with 64 rows, 4 warps and 2 stages 0.81, 1.05. Without erase at B8 T4096: 0.51, with 64 rows
    the same, with 4 stages 3% more; where each read had a launch of its own 0.64. With tiles finished as they come, not by
    quarters: 0.94, 1.24 and 0.54.
    """
    launch = piece_reads.choose_launch(dtype)
    return launch._replace(num_stages=min(launch.num_stages, 3))


TABLE = LaunchTable(
    "piece_gradients",
    lambda kernel, decay, key_dim, value_dim, dtype: choose_launch(dtype),
    lambda kernel, decay, key_dim, value_dim, dtype: choices(dtype),
)
"""By the kernel, "scan", or the delta rule's "writes" and "reads", the decay, K, V and the dtype. The piece is that of
`piece_reads`."""


@triton.jit
def _place(borders_ptr, borders_stride, program, HEADS: tl.constexpr, BLOCKS: tl.constexpr):
    """Which block of which head and piece a program is for."""
    piece = (program // (BLOCKS * HEADS)).to(tl.int64)
    start, size = piece_of(borders_ptr, borders_stride, piece)
    return program % BLOCKS, (program // BLOCKS) % HEADS, piece, start, size


@triton.jit
def _settled(x, ptr, valid):
    """`x` by way of memory, written by one thread and read by others of the program.

    A number that a product's tile left behind is laid out as that is, and would draw to it every tile that it multiplies.
    """
    tl.store(ptr, x, mask=valid)
    tl.debug_barrier()
    x = tl.load(ptr, mask=valid, other=0.0)
    # The place may be written again.
    tl.debug_barrier()
    return x


@triton.jit
def _finish_columns(
    o, weights, x_ptr, y_ptr, out_ptr, start, row, valid, head, x_head, y_head, FIRST: tl.constexpr, HEADS: tl.constexpr,
    X_HEADS: tl.constexpr, Y_HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    overlap = tl.zeros((o.shape[0],), tl.float32)
    # Some columns of a block may be past the width, or all.
    if FIRST < WIDTH:
        columns = FIRST + tl.arange(0, o.shape[1])
        if x_ptr is not None:
            overlap += tl.sum(
                o * load_rows(x_ptr, start, x_head, X_HEADS, WIDTH, row, columns, valid).to(tl.float32), 1
            )
        if y_ptr is not None:
            y = load_rows(y_ptr, start, y_head, Y_HEADS, WIDTH, row, columns, valid).to(tl.float32)
            o += weights[:, None] * y
        store_rows(out_ptr, o, start, head, HEADS, WIDTH, row, columns, valid)
    return overlap


@triton.jit
def _finish(
    o, weights, x_ptr, y_ptr, out_ptr, start, row, valid, head, x_head, y_head, HEADS: tl.constexpr, X_HEADS: tl.constexpr,
    Y_HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store o + weights y, and return <o, x> of every row; a null pointer leaves its part out.

    In float32 a tile of 256 columns goes through shared memory to the layout in which the others are loaded. All of it at
    once, with one of them, would not fit the registers: a quarter does.
    """
    QUARTER: tl.constexpr = o.shape[1] // 4
    first, second, third, fourth = quarters(o)
    overlap = _finish_columns(first, weights, x_ptr, y_ptr, out_ptr, start, row, valid, head, x_head, y_head, 0, HEADS,
                              X_HEADS, Y_HEADS, WIDTH)  # fmt: skip
    overlap += _finish_columns(second, weights, x_ptr, y_ptr, out_ptr, start, row, valid, head, x_head, y_head, QUARTER,
                               HEADS, X_HEADS, Y_HEADS, WIDTH)  # fmt: skip
    overlap += _finish_columns(third, weights, x_ptr, y_ptr, out_ptr, start, row, valid, head, x_head, y_head, 2 * QUARTER,
                               HEADS, X_HEADS, Y_HEADS, WIDTH)  # fmt: skip
    overlap += _finish_columns(fourth, weights, x_ptr, y_ptr, out_ptr, start, row, valid, head, x_head, y_head, 3 * QUARTER,
                               HEADS, X_HEADS, Y_HEADS, WIDTH)  # fmt: skip
    return overlap


@triton.jit
def _known_along_key(
    do_ptr, v_ptr, wrong_ptr, k_ptr, beta, start, row, valid, head, k_head, scale, HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """<dq, k> of every row, as `linear_moe.kernels.delta_along_keys` has it."""
    squares, of_values, of_wrong = (tl.zeros((row.shape[0],), tl.float32),) * 3
    for first in range(0, K, SLICE):
        k = load_rows(k_ptr, start, k_head, K_HEADS, K, row, first + tl.arange(0, SLICE), valid).to(tl.float32)
        squares += tl.sum(k * k, 1)
    for first in range(0, V, SLICE):
        values = first + tl.arange(0, SLICE)
        do = load_rows(do_ptr, start, head, HEADS, V, row, values, valid).to(tl.float32)
        of_values += tl.sum(do * load_rows(v_ptr, start, head, HEADS, V, row, values, valid).to(tl.float32), 1)
        of_wrong += tl.sum(do * load_rows(wrong_ptr, start, head, HEADS, V, row, values, valid).to(tl.float32), 1)
    return scale * (of_values - (1.0 - beta * squares) * of_wrong)


@triton.jit
def _along_columns(o, k_ptr, start, row, valid, head, FIRST: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """<o, k> and |k|^2 of some columns of a tile."""
    along, squares = (tl.zeros((o.shape[0],), tl.float32),) * 2
    if FIRST < WIDTH:
        columns = FIRST + tl.arange(0, o.shape[1])
        k = load_rows(k_ptr, start, head, HEADS, WIDTH, row, columns, valid).to(tl.float32)
        along += tl.sum(o * k, 1)
        squares += tl.sum(k * k, 1)
    return along, squares


@triton.jit
def _finish_along_key(
    o, known, beta, k_ptr, out_ptr, start, row, valid, head, k_head, HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Store o with <o, k> put to what is `known` of it, of rows that have a strong write among them."""
    QUARTER: tl.constexpr = o.shape[1] // 4
    first, second, third, fourth = quarters(o)
    along, squares = _along_columns(first, k_ptr, start, row, valid, k_head, 0, K_HEADS, WIDTH)
    more, others = _along_columns(second, k_ptr, start, row, valid, k_head, QUARTER, K_HEADS, WIDTH)
    along += more
    squares += others
    more, others = _along_columns(third, k_ptr, start, row, valid, k_head, 2 * QUARTER, K_HEADS, WIDTH)
    along += more
    squares += others
    more, others = _along_columns(fourth, k_ptr, start, row, valid, k_head, 3 * QUARTER, K_HEADS, WIDTH)
    along += more
    squares += others
    rest = rest_along_key(known - along, squares, beta)
    _finish_columns(first, rest, None, k_ptr, out_ptr, start, row, valid, head, k_head, k_head, 0, HEADS, K_HEADS, K_HEADS,
                    WIDTH)  # fmt: skip
    _finish_columns(second, rest, None, k_ptr, out_ptr, start, row, valid, head, k_head, k_head, QUARTER, HEADS, K_HEADS,
                    K_HEADS, WIDTH)  # fmt: skip
    _finish_columns(third, rest, None, k_ptr, out_ptr, start, row, valid, head, k_head, k_head, 2 * QUARTER, HEADS, K_HEADS,
                    K_HEADS, WIDTH)  # fmt: skip
    _finish_columns(fourth, rest, None, k_ptr, out_ptr, start, row, valid, head, k_head, k_head, 3 * QUARTER, HEADS, K_HEADS,
                    K_HEADS, WIDTH)  # fmt: skip


@triton.jit
def scan_gradients_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    decay_ptr,
    states_ptr,
    ends_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    read_ptr,
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    DECAY: tl.constexpr,
    IN_FULL: tl.constexpr,
    THREADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`read` and `written`: <dq, q> and <dv, v> without a token's own pair; null pointers leave them out."""
    program = tl.program_id(0)
    part = program % 3
    block, head, piece, start, size = _place(borders_ptr, borders_stride, program // 3, HEADS, PIECE // ROWS)
    if block * ROWS >= size:
        return
    size = rows_left(size, 0, PIECE, IN_FULL)
    row = block * ROWS + tl.arange(0, ROWS)
    valid = row < size
    k_head = head // (HEADS // K_HEADS)
    at = head.to(tl.int64) * num_tokens + start + row
    rate = rate_of(decay_ptr, head, DECAY, PRECISION)
    end = tl.minimum((block + 1) * ROWS, size)
    # No `elif`: triton 3.6 gives the tiles of its branches shared memory of their own.
    if part == 0:
        # A token's own pair crosses nothing: it is added after the overlap is taken.
        APART: tl.constexpr = read_ptr is not None
        dq, own = read_rows(
            do_ptr, v_ptr, k_ptr, states_ptr, decay_ptr, None, start, size, piece, head, row, rate, num_tokens, 0, end, scale,
            HEADS, HEADS, HEADS, K_HEADS, V, K, COLUMNS, V_BLOCK, K_BLOCK, SLICE, DECAY, IN_FULL, False, True, APART, THREADS,
            PRECISION,
        )  # fmt: skip
        if APART:
            own = _settled(own, read_ptr + at, valid)
            read = _finish(
                dq, own, q_ptr, k_ptr, dq_ptr, start, row, valid, head, k_head, k_head, HEADS, K_HEADS, K_HEADS, K
            )
            tl.store(read_ptr + at, read, mask=valid)
        else:
            _finish(dq, None, None, None, dq_ptr, start, row, valid, head, k_head, k_head, HEADS, K_HEADS, K_HEADS, K)
    if part == 1:
        dk, _ = read_rows(
            v_ptr, do_ptr, q_ptr, ends_ptr, decay_ptr, None, start, size, piece, head, row, rate, num_tokens, block * ROWS,
            size, scale, HEADS, HEADS, HEADS, K_HEADS, V, K, COLUMNS, V_BLOCK, K_BLOCK, SLICE, DECAY, IN_FULL, True, True,
            False, THREADS, PRECISION,
        )  # fmt: skip
        _finish(dk, None, None, None, dk_ptr, start, row, valid, head, k_head, k_head, HEADS, K_HEADS, K_HEADS, K)
    if part == 2:
        dv, own = read_rows(
            k_ptr, q_ptr, do_ptr, ends_ptr, decay_ptr, None, start, size, piece, head, row, rate, num_tokens, block * ROWS,
            size, scale, HEADS, K_HEADS, K_HEADS, HEADS, K, V, COLUMNS, K_BLOCK, V_BLOCK, SLICE, DECAY, IN_FULL, True, False,
            written_ptr is not None, THREADS, PRECISION,
        )  # fmt: skip
        if written_ptr is not None:
            own = _settled(own, written_ptr + at, valid)
            written = _finish(
                dv, own, v_ptr, do_ptr, dv_ptr, start, row, valid, head, head, head, HEADS, HEADS, HEADS, V
            )
            tl.store(written_ptr + at, written, mask=valid)
        else:
            _finish(dv, None, None, None, dv_ptr, start, row, valid, head, head, head, HEADS, HEADS, HEADS, V)


@triton.jit
def delta_writes_kernel(
    q_ptr,
    k_ptr,
    do_ptr,
    dv_ptr,
    wrong_ptr,
    decay_ptr,
    beta_ptr,
    ends_ptr,
    dk_ptr,
    own_ptr,
    written_ptr,
    borders_ptr,
    borders_stride,
    num_tokens,
    scale,
    minus,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    DECAY: tl.constexpr,
    IN_FULL: tl.constexpr,
    THREADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The write's part of dk. `written`: <dk, k> without a token's own pair; a null pointer without a decay. `own` is room for
    a number of each token.

    `minus` is -1, and no constant: of a sum of products of which only the sign is turned, ptxas (12.8, that of triton 3.6) can
    leave the products out.
    """
    block, head, piece, start, size = _place(borders_ptr, borders_stride, tl.program_id(0), HEADS, PIECE // ROWS)
    if block * ROWS >= size:
        return
    size = rows_left(size, 0, PIECE, IN_FULL)
    row = block * ROWS + tl.arange(0, ROWS)
    valid = row < size
    k_head = head // (HEADS // K_HEADS)
    at = head.to(tl.int64) * num_tokens + start + row
    rate = rate_of(decay_ptr, head, DECAY, PRECISION)
    dk, wrong, summed = begin_rows(
        wrong_ptr, ends_ptr, decay_ptr, start, size, piece, head, row, rate, num_tokens, scale, HEADS, HEADS, V, K, V_BLOCK,
        K_BLOCK, SLICE, DECAY, IN_FULL, True, True, PRECISION,
    )  # fmt: skip
    nothing = tl.zeros((ROWS,), tl.float32)
    dk, own = add_pairs(
        dk, nothing, wrong, row, summed, rate, do_ptr, q_ptr, decay_ptr, None, start, size, head, num_tokens, scale,
        block * ROWS, size, HEADS, HEADS, K_HEADS, V, K, COLUMNS, V_BLOCK, K_BLOCK, DECAY, IN_FULL, True, True, THREADS,
        PRECISION,
    )  # fmt: skip
    dk, _ = add_pairs(
        dk, nothing, wrong, row, summed, rate, dv_ptr, k_ptr, decay_ptr, None, start, size, head, num_tokens, minus,
        block * ROWS, size, HEADS, HEADS, K_HEADS, V, K, COLUMNS, V_BLOCK, K_BLOCK, DECAY, IN_FULL, True, True, THREADS,
        PRECISION,
    )  # fmt: skip
    beta = tl.load(beta_ptr + at, mask=valid, other=0.0)
    dk *= beta[:, None]
    own = _settled(own * beta, own_ptr + at, valid)
    if DECAY != NO_DECAY:
        written = _finish(
            dk, own, k_ptr, q_ptr, dk_ptr, start, row, valid, head, k_head, k_head, HEADS, K_HEADS, K_HEADS, K
        )
        tl.store(written_ptr + at, written, mask=valid)
    else:
        _finish(dk, own, None, q_ptr, dk_ptr, start, row, valid, head, k_head, k_head, HEADS, K_HEADS, K_HEADS, K)


@triton.jit
def delta_reads_kernel(
    q_ptr,
    k_ptr,
    do_ptr,
    dv_ptr,
    v_ptr,
    wrong_ptr,
    decay_ptr,
    beta_ptr,
    states_ptr,
    dq_ptr,
    dk_ptr,
    own_ptr,
    read_ptr,
    erased_ptr,
    borders_ptr,
    borders_stride,
    num_tokens,
    scale,
    minus,
    HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    DECAY: tl.constexpr,
    IN_FULL: tl.constexpr,
    THREADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, and the erase's part of dk, added to what `dk` holds. `read` and `erased`: <dq, q> and <dk, k> without a token's own
    pair; null pointers without a decay. `own` is room for a number of each token. Without a decay dq is put right along the
    token's own key.
    """
    program = tl.program_id(0)
    part = program % 2
    block, head, piece, start, size = _place(borders_ptr, borders_stride, program // 2, HEADS, PIECE // ROWS)
    if block * ROWS >= size:
        return
    size = rows_left(size, 0, PIECE, IN_FULL)
    row = block * ROWS + tl.arange(0, ROWS)
    valid = row < size
    k_head = head // (HEADS // K_HEADS)
    at = head.to(tl.int64) * num_tokens + start + row
    rate = rate_of(decay_ptr, head, DECAY, PRECISION)
    end = tl.minimum((block + 1) * ROWS, size)
    if part == 0:
        if DECAY == NO_DECAY:
            beta = tl.load(beta_ptr + at, mask=valid, other=0.0)
            known = _known_along_key(
                do_ptr, v_ptr, wrong_ptr, k_ptr, beta, start, row, valid, head, k_head, scale, HEADS, K_HEADS, K, V, SLICE,
            )  # fmt: skip
            tl.store(own_ptr + at, known, mask=valid)
        # A token's own pair crosses nothing.
        APART: tl.constexpr = DECAY != NO_DECAY
        dq, own = read_rows(
            do_ptr, wrong_ptr, k_ptr, states_ptr, decay_ptr, beta_ptr, start, size, piece, head, row, rate, num_tokens, 0, end,
            scale, HEADS, HEADS, HEADS, K_HEADS, V, K, COLUMNS, V_BLOCK, K_BLOCK, SLICE, DECAY, IN_FULL, False, True, APART,
            THREADS, PRECISION,
        )  # fmt: skip
        if APART:
            own = _settled(own, own_ptr + at, valid)
            read = _finish(
                dq, own, q_ptr, k_ptr, dq_ptr, start, row, valid, head, k_head, k_head, HEADS, K_HEADS, K_HEADS, K
            )
            tl.store(read_ptr + at, read, mask=valid)
        else:
            tl.debug_barrier()
            known = tl.load(own_ptr + at, mask=valid, other=0.0)
            beta = tl.load(beta_ptr + at, mask=valid, other=0.0)
            _finish_along_key(dq, known, beta, k_ptr, dq_ptr, start, row, valid, head, k_head, HEADS, K_HEADS, K)
    if part == 1:
        # The erase reads before the token writes.
        dk, _ = read_rows(
            dv_ptr, wrong_ptr, k_ptr, states_ptr, decay_ptr, beta_ptr, start, size, piece, head, row, rate, num_tokens, 0, end,
            minus, HEADS, HEADS, HEADS, K_HEADS, V, K, COLUMNS, V_BLOCK, K_BLOCK, SLICE, DECAY, IN_FULL, False, True, True,
            THREADS, PRECISION,
        )  # fmt: skip
        once = tl.full((ROWS,), 1.0, tl.float32)
        if DECAY != NO_DECAY:
            erased = _finish(
                dk, once, k_ptr, dk_ptr, dk_ptr, start, row, valid, head, k_head, head, HEADS, K_HEADS, HEADS, K
            )
            tl.store(erased_ptr + at, erased, mask=valid)
        else:
            _finish(dk, once, None, dk_ptr, dk_ptr, start, row, valid, head, k_head, head, HEADS, K_HEADS, HEADS, K)


class ScanOverlaps(NamedTuple):
    """Of what a decay's gradient is made, `[tiles, H, S]` each: of reads and of writes, to be summed over tiles."""

    read: Tensor
    written: Tensor


def scan_gradients(
    pieces: Pieces, q: Tensor, k: Tensor, v: Tensor, d_output: Tensor, states: Tensor, ends: Tensor, dq: Tensor, dk: Tensor,
    dv: Tensor, *, scale: float, want_decay: bool,
) -> ScanOverlaps | None:  # fmt: skip
    """Fill dq and dk `[S, H, K]` and dv `[S, H, V]` by the module's first equations; the overlaps, if wanted.

    Args:
        pieces: the pieces and their decays.
        q: `[S, *, K]`, as k. May have fewer heads than there are.
        k: `[S, *, K]`
        v: `[S, H, V]`, as `d_output`.
        d_output: `[S, H, V]`
        states: S_0 `[P, H, K, V]`, as `ends`.
        ends: dS
        dq: `[S, H, K]`, as dk.
        dk: `[S, H, K]`
        dv: `[S, H, V]`
        scale: of the output.
        want_decay: whether the overlaps are.
    """
    overlaps = None
    if want_decay:
        both = torch.empty(2, 1, pieces.heads, v.shape[0], dtype=torch.float32, device=v.device)
        overlaps = ScanOverlaps(both[0], both[1])
    launch = TABLE.pick(v.device, "scan", DECAY_NAMES[pieces.kind], k.shape[2], v.shape[2], k.dtype)
    borders = pieces.splits.borders
    launch_kernel(
        scan_gradients_kernel, 3 * pieces.num_programs(launch), q, k, v, d_output, pieces.decays, states, ends, dq, dk, dv,
        *((None, None) if overlaps is None else overlaps), borders, borders.stride(0), v.shape[0], scale,
        **pieces.constants(launch, k, v),
    )  # fmt: skip
    return overlaps


def delta_gradients(
    pieces: Pieces, q: Tensor, k: Tensor, v: Tensor, wrong: Tensor, beta: Tensor, d_output: Tensor, dv: Tensor, states: Tensor,
    ends: list[Tensor], dtype: torch.dtype, *, scale: float,
) -> tuple[Tensor, Tensor, ScanOverlaps | None]:  # fmt: skip
    """Make dq and dk `[S, H, K]` by the module's last equations; the overlaps, of reads `[2, H, S]`, where there is a decay.

    Args:
        pieces: the pieces and their decays.
        q: `[S, *, K]`, as k. May have fewer heads than there are.
        k: `[S, *, K]`
        v: `[S, H, V]`
        wrong: r `[S, H, V]`
        beta: b `[H, S]` float32
        d_output: `[S, H, V]`
        dv: `[S, H, V]`, made already.
        states: S_0 `[P, H, K, V]`
        ends: dS `[P, H, K, V]` alone in a list, which is emptied: its memory is dq's.
        dtype: of dq and dk.
        scale: of the output.
    """
    overlaps, each = None, (None, None, None)
    if pieces.decays is not None:
        three = torch.empty(3, *beta.shape, dtype=torch.float32, device=k.device)
        overlaps, each = ScanOverlaps(three[:2], three[2:]), tuple(three)
    read, erased, written = each
    own = torch.empty(beta.shape, dtype=torch.float32, device=k.device)
    borders = pieces.splits.borders
    given, gates = (q, k, d_output, dv), (pieces.decays, beta)
    where = (borders, borders.stride(0), wrong.shape[0], scale, -1.0)
    writes, reads = (
        TABLE.pick(k.device, name, DECAY_NAMES[pieces.kind], k.shape[2], wrong.shape[2], k.dtype)
        for name in ("writes", "reads")
    )
    dk = torch.empty(*wrong.shape[:2], k.shape[2], dtype=dtype, device=k.device)
    launch_kernel(
        delta_writes_kernel, pieces.num_programs(writes), *given, wrong, *gates, ends.pop(), dk, own, written, *where,
        **pieces.constants(writes, k, wrong),
    )  # fmt: skip
    dq = torch.empty_like(dk)
    launch_kernel(
        delta_reads_kernel, 2 * pieces.num_programs(reads), *given, v, wrong, *gates, states, dq, dk, own, read, erased, *where,
        **pieces.constants(reads, k, wrong),
    )  # fmt: skip
    return dq, dk, overlaps
