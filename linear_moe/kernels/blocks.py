"""What the kernels share: where a program stands, what a chunk's decays do, and rows that no segment owns."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.forms import Decay
from linear_moe.kernels.launch import launch_kernel

NO_DECAY = tl.constexpr(0)
HEAD_DECAY = tl.constexpr(1)
SCALAR_DECAY = tl.constexpr(2)
DECAY_KINDS = {Decay.NONE: 0, Decay.HEAD: 1, Decay.SCALAR: 2}
DECAY_NAMES = tuple(decay.value for decay in DECAY_KINDS)
"""By the same numbers."""

LOG2E = tl.constexpr(1.4426950408889634)
"""Kernels have sums of log decays to base 2: of a power of 2 an H100 makes one instruction, of e five."""

Direction = Literal["forwards", "backwards"]
"""In time."""

LIMIT = tl.constexpr(40.0)
"""How far, to base 2, a chunk of a mild decay may fade. No factor is then above 2^40 or below 2^-40, of the 2^126 that float32
and bfloat16 have either way: two thirds of them are left for what is scaled. A token fades to 0.65 on average. Float16 has no
such range."""

ROWS_BLOCK = 64
COLUMNS_BLOCK = 512


@triton.jit
def piece_of(borders_ptr, stride, piece):
    """First token of a piece of a segment (int64) and how many it has (int32)."""
    start = tl.load(borders_ptr + stride * piece)
    size = (tl.load(borders_ptr + stride * piece + 1) - start).to(tl.int32)
    return start, size


@triton.jit
def piece_at(order_ptr, turn):
    """The piece (int64) whose turn it is: they come one after another, or in an order that is given."""
    # One return: the compiler wants the same type from both.
    piece = turn.to(tl.int64)
    if order_ptr is not None:
        piece = tl.load(order_ptr + piece)
    return piece


@triton.jit
def walk_at(order_ptr, borders_ptr, borders_stride, HEADS: tl.constexpr, TILES: tl.constexpr):
    """Which tile of which head of which piece a program walks; the piece's first token and how many it has."""
    program = tl.program_id(0)
    tile = program % TILES
    head = (program // TILES) % HEADS
    piece = piece_at(order_ptr, program // (TILES * HEADS))
    start, size = piece_of(borders_ptr, borders_stride, piece)
    return tile, head, piece, start, size


@triton.jit
def part_of(borders_ptr, stride, part, PIECE: tl.constexpr, PART: tl.constexpr):
    """The same of a part of a piece: pieces of PIECE tokens have PIECE // PART, of which the last may be empty."""
    PARTS: tl.constexpr = PIECE // PART
    start, size = piece_of(borders_ptr, stride, part // PARTS)
    before = (part % PARTS).to(tl.int32) * PART
    return start + before, tl.maximum(tl.minimum(size - before, PART), 0)


@triton.jit
def rows_left(size, done, ROWS: tl.constexpr, IN_FULL: tl.constexpr):
    """How many of the next ROWS rows a piece of `size` has. IN_FULL: all of them, and the compiler leaves masks out."""
    if IN_FULL:
        left = ROWS
    else:
        left = tl.minimum(size - done, ROWS)
    return left


@triton.constexpr_function
def divides(part, whole):
    """Whether tiles of `part` make up the `whole`: then none that begins in it reaches past it."""
    return whole % part == 0


@triton.jit
def rows_mask(valid, columns, WIDTH: tl.constexpr):
    """Of a tile `[rows, columns]` whose first column is inside WIDTH."""
    if divides(columns.shape[0], WIDTH):
        mask = valid[:, None]
    else:
        mask = valid[:, None] & (columns < WIDTH)[None, :]
    return mask


@triton.jit
def load_rows(ptr, first, head, HEADS: tl.constexpr, WIDTH: tl.constexpr, rows, columns, valid):
    """The tile `[rows, columns]` of one head of a tensor `[S, HEADS, WIDTH]` from its row `first` (int64) on; 0 outside.

    The offsets inside a tile are 32-bit and the same in every step of a walk: only a scalar moves, and the registers that
    64-bit addresses of every row would take are free for the state.
    """
    at = rows.to(tl.int64)[:, None] * (HEADS * WIDTH) + columns[None, :]
    base = ptr + (first * HEADS + head) * WIDTH
    return tl.load(base + at, mask=rows_mask(valid, columns, WIDTH), other=0.0)


@triton.jit
def load_columns(ptr, first, head, HEADS: tl.constexpr, WIDTH: tl.constexpr, rows, columns, valid):
    """The same tile transposed, `[columns, rows]`, by address: no accumulator and no operand is transposed."""
    at = rows.to(tl.int64)[None, :] * (HEADS * WIDTH) + columns[:, None]
    base = ptr + (first * HEADS + head) * WIDTH
    if divides(columns.shape[0], WIDTH):
        mask = valid[None, :]
    else:
        mask = valid[None, :] & (columns < WIDTH)[:, None]
    return tl.load(base + at, mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, tile, first, head, HEADS: tl.constexpr, WIDTH: tl.constexpr, rows, columns, valid):
    """The reverse of `load_rows`, rounded to the tensor's dtype."""
    at = rows.to(tl.int64)[:, None] * (HEADS * WIDTH) + columns[None, :]
    base = ptr + (first * HEADS + head) * WIDTH
    tl.store(base + at, tile.to(ptr.dtype.element_ty), mask=rows_mask(valid, columns, WIDTH))


@triton.jit
def state_offsets(piece, head, HEADS: tl.constexpr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                  TRANSPOSED: tl.constexpr):  # fmt: skip
    """Where the state `[ROWS, COLUMNS]` of one (piece, head) lies; TRANSPOSED: it is kept as `[COLUMNS, ROWS]`."""
    if TRANSPOSED:
        at = rows[:, None] + columns[None, :] * ROWS
    else:
        at = rows[:, None] * COLUMNS + columns[None, :]
    return at + (piece * HEADS + head) * ROWS * COLUMNS


@triton.jit
def load_start(initial_ptr, joined_ptr, owner_ptr, first_ptr, piece, head, HEADS: tl.constexpr, rows, columns,
               ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr, REVERSE: tl.constexpr):  # fmt: skip
    """The state `[rows, columns]` that the walk of a piece starts from, of those in `linear_moe.kernels.join.Starts`."""
    inside = (columns < COLUMNS)[None, :]
    at = state_offsets(piece, head, HEADS, rows, columns, ROWS, COLUMNS, TRANSPOSED)
    if joined_ptr is None:
        if initial_ptr is None:
            state = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
        else:
            state = tl.load(initial_ptr + at, mask=(rows < ROWS)[:, None] & inside, other=0.0)
    else:
        segment = tl.load(owner_ptr + piece)
        last = tl.load(first_ptr + segment + 1) - 1
        outermost = last if REVERSE else tl.load(first_ptr + segment)
        # All rows of one or the other; of neither where the piece, past the last, is of no segment.
        joined = tl.where((piece != outermost) & (piece <= last), ROWS, 0)
        state = tl.load(joined_ptr + at, mask=(rows < joined)[:, None] & inside, other=0.0)
        if initial_ptr is not None:
            given = tl.where(piece == outermost, ROWS, 0)
            at = state_offsets(segment, head, HEADS, rows, columns, ROWS, COLUMNS, TRANSPOSED)
            state += tl.load(initial_ptr + at, mask=(rows < given)[:, None] & inside, other=0.0)
    return state


@triton.jit
def folded_offsets(chunk, head, blocks_apart, HEADS: tl.constexpr, keys, values, K: tl.constexpr, BLOCK: tl.constexpr):
    """Where the state of one (chunk, head) lies in what `new_folded_states` makes: `[keys, values]` int64."""
    WIDTH: tl.constexpr = (K + BLOCK - 1) // BLOCK * BLOCK
    row = (keys % BLOCK).to(tl.int64) * (HEADS * WIDTH) + keys // BLOCK * BLOCK
    column = (values // BLOCK).to(tl.int64) * blocks_apart + values % BLOCK
    return row[:, None] + column[None, :] + (chunk * BLOCK * HEADS + head) * WIDTH


@triton.jit
def to_base_2(log_decay):
    # A number in the text would be a float32.
    return log_decay * tl.full((), LOG2E, log_decay.dtype)


@triton.jit
def rate_of(decay_ptr, head, DECAY: tl.constexpr, PRECISION: tl.constexpr):
    """The log decay, to base 2, of a head whose decay is constant, as exact as the results are to be."""
    rate = 0.0
    if DECAY == HEAD_DECAY:
        rate = tl.load(decay_ptr + head)
        if PRECISION == "ieee":
            rate = rate.to(tl.float64)
        rate = to_base_2(rate)
    return rate


@triton.constexpr_function
def doublings(rows, threads):
    """How often rows must be doubled to be as many as threads."""
    return max((threads // rows).bit_length() - 1, 0)


@triton.jit
def load_numbers(ptr, at, valid, THREADS: tl.constexpr):
    """A number of every row, 0 where it is not valid (None: all are).

    Of fewer numbers than a program has THREADS the compiler thinks that they cost nothing, and has every thread load what
    it needs, anew for every layout in which they are wanted: some thirty copies of four bytes a thread and chunk. So each
    number is asked for as often as it takes to be as many; then it is copied once, and read from there. 0 leaves that out.
    """
    LEVELS: tl.constexpr = doublings(at.shape[0], THREADS)
    COPIES: tl.constexpr = 2**LEVELS
    if COPIES > 1:
        at = tl.reshape(tl.broadcast_to(at[:, None], (at.shape[0], COPIES)), (at.shape[0] * COPIES,))
        if valid is not None:
            valid = tl.reshape(tl.broadcast_to(valid[:, None], (valid.shape[0], COPIES)), (valid.shape[0] * COPIES,))
    if valid is None:
        numbers = tl.load(ptr + at)
    else:
        numbers = tl.load(ptr + at, mask=valid, other=0.0)
    for _ in tl.static_range(LEVELS):
        numbers, _other = tl.split(tl.reshape(numbers, (numbers.shape[0] // 2, 2)))
    return numbers


@triton.jit
def summed_decays(
    decay_ptr, rate, head, first, rows, num_rows, num_tokens, DECAY: tl.constexpr, THREADS: tl.constexpr = 0
):
    """Sums of the log decays, to base 2, up to each row of a chunk, and over its `num_rows` rows.

    `decay_ptr` holds them as `gates_by_head` makes them; a constant decay a head is `rate` a row. THREADS as in `load_numbers`.
    """
    if DECAY == HEAD_DECAY:
        summed = rate * (rows + 1)
        total = rate * num_rows
    else:
        base = decay_ptr + head.to(tl.int64) * num_tokens + first
        # Rows past the last keep its sum: their decays must not overflow.
        summed = load_numbers(base, tl.minimum(rows, num_rows - 1), None, THREADS)
        total = tl.load(base + (num_rows - 1))
    return summed, total


@triton.jit
def decay_of(summed):
    """The decay, float32, that a sum of log decays is of. Of an exact sum, a float64, it is one as well.

    The one instruction that makes a power of 2 in float32 leaves off its last two bits.
    """
    return tl.exp2(summed).to(tl.float32)


@triton.jit
def decay_between(later, earlier):
    """The decay from one token to a later one; 1 where they come the other way round, and it might overflow."""
    return decay_of(tl.minimum(later - earlier, 0.0))


@triton.jit
def decay_where(seen, later, earlier):
    """The decay from one token to a later one where it is seen; else 0."""
    return decay_of(tl.where(seen, later - earlier, float("-inf")))


@triton.jit
def strongest_decay(sums_ptr, rate, size, CHUNK: tl.constexpr, DECAY: tl.constexpr):
    """The least sum of log decays, to base 2, of a chunk of a walk; `sums` are a token's from its chunk's start."""
    if DECAY == HEAD_DECAY:
        least = rate * CHUNK
    else:
        CHUNKS: tl.constexpr = 64
        least_of_each = tl.zeros((CHUNKS,), sums_ptr.dtype.element_ty)
        for done in range(0, size, CHUNKS * CHUNK):
            begin = done + CHUNK * tl.arange(0, CHUNKS)
            total = tl.load(sums_ptr + tl.minimum(begin + CHUNK, size) - 1, mask=begin < size, other=0.0)
            least_of_each = tl.minimum(least_of_each, total)
        least = tl.min(least_of_each, 0)
    return least


@triton.jit
def is_mild(sums_ptr, rate, size, CHUNK: tl.constexpr, DECAY: tl.constexpr):
    """Whether decays of a walk can be factors of a token."""
    return strongest_decay(sums_ptr, rate, size, CHUNK, DECAY) >= -LIMIT


def wants_factors(dtype: torch.dtype) -> bool:
    """Whether the dtype has room for what a mild decay scales."""
    return dtype != torch.float16


@triton.jit
def store_factors(ptr, token, left, mask):
    """Of tokens that are a decay away from where a chunk is seen from, whose log to base 2 is `left`: the decay of what they
    write, and its inverse, of what they read. Inverses of decays that are too strong for any walk to use them are finite.
    """
    tl.store(ptr + 2 * token, decay_of(left), mask=mask)
    tl.store(ptr + 2 * token + 1, decay_of(tl.minimum(-left, 126.0)), mask=mask)


@triton.jit
def sigmoids(z):
    """Of z and of -z, without an exponential that could overflow."""
    fading = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + fading)
    smaller = fading * larger
    return tl.where(z >= 0, larger, smaller), tl.where(z >= 0, smaller, larger)


@triton.constexpr_function
def sum_dtype(PRECISION):
    """In what is summed what a product of this precision adds to: `ieee`, of float32, in float64."""
    return tl.float64 if PRECISION == "ieee" else tl.float32


@triton.jit
def product(x, y, PRECISION: tl.constexpr):
    """The product x y in float32; `ieee`: in float64, as `sum_of_products`."""
    if PRECISION == "ieee":
        made = tl.dot(x.to(tl.float64), y.to(tl.float64), out_dtype=tl.float64)
    else:
        made = tl.dot(x, y, input_precision=PRECISION)
    return made


@triton.jit
def sum_of_products(x, y, sum, PRECISION: tl.constexpr):
    """A sum with x y added, y rounded to the dtype of x; `ieee`: in float64, and left so. A GPU adds the terms of a float32
    product one after another to the sum, each rounded at its size; and what is erased of what was written can leave a small
    rest of large numbers.
    """
    if PRECISION == "ieee":
        sum = tl.dot(x.to(tl.float64), y.to(tl.float64), acc=sum.to(tl.float64), out_dtype=tl.float64)
    else:
        sum = tl.dot(x, y.to(x.dtype), acc=sum, input_precision=PRECISION)
    return sum


@triton.jit
def _zero_kernel(ptr, border_ptr, num_tokens, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    border = tl.load(border_ptr)
    if tl.program_id(0).to(tl.int64) * ROWS + ROWS > border:
        outside = (row >= border) & (row < num_tokens)
        for first in range(0, WIDTH, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            at = row[:, None] * WIDTH + column[None, :]
            zero = tl.zeros((ROWS, COLUMNS), ptr.dtype.element_ty)
            tl.store(ptr + at, zero, mask=outside[:, None] & (column < WIDTH)[None, :])


def zero_uncovered(tensor: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Set rows of `tensor` `[S, ...]` past the last border to 0: they are in no segment, and no walk writes them."""
    num_tokens = tensor.shape[0]
    if tensor.numel():
        launch_kernel(
            _zero_kernel,
            cdiv(num_tokens, ROWS_BLOCK),
            tensor,
            cu_seqlens[-1:],
            num_tokens,
            WIDTH=tensor[0].numel(),
            ROWS=ROWS_BLOCK,
            COLUMNS=COLUMNS_BLOCK,
        )
    return tensor


@triton.jit
def _by_head_kernel(
    decay_ptr, beta_ptr, sums_ptr, inner_ptr, by_head_ptr, factors_ptr, borders_ptr, num_tokens, HEADS: tl.constexpr,
    BLOCK: tl.constexpr, PIECE: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """A null pointer leaves its part out."""
    piece = tl.program_id(0).to(tl.int64)
    start, size = piece_of(borders_ptr, 2, piece)
    rows = tl.arange(0, PIECE)
    for head in range(0, HEADS, BLOCK):
        heads = head + tl.arange(0, BLOCK)
        mask = (rows < size)[:, None] & (heads < HEADS)[None, :]
        by_token = (start + rows)[:, None] * HEADS + heads[None, :]
        by_head = heads[None, :].to(tl.int64) * num_tokens + (start + rows)[:, None]
        if beta_ptr is not None:
            beta = tl.load(beta_ptr + by_token, mask=mask, other=0.0)
            tl.store(by_head_ptr + by_head, beta.to(by_head_ptr.dtype.element_ty), mask=mask)
        if decay_ptr is not None:
            each = to_base_2(tl.load(decay_ptr + by_token, mask=mask, other=0.0).to(sums_ptr.dtype.element_ty))
            tl.store(sums_ptr + by_head, tl.cumsum(each, 0), mask=mask)
            if (inner_ptr is not None) or (factors_ptr is not None):
                chunks = tl.reshape(each, (PIECE // CHUNK, CHUNK, BLOCK))
                inner = tl.cumsum(chunks, 1)
                if inner_ptr is not None:
                    tl.store(inner_ptr + by_head, tl.reshape(inner, (PIECE, BLOCK)), mask=mask)
                if factors_ptr is not None:
                    left = inner
                    if not REVERSE:
                        left = tl.sum(chunks, 1)[:, None, :] - inner
                    store_factors(factors_ptr, by_head, tl.reshape(left, (PIECE, BLOCK)), mask)


class GatesByHead(NamedTuple):
    """Gates as walks read them, a head's side by side: `[H, S]`. Of tokens in no piece they are anything."""

    sums: Tensor | None
    """Of the log decays, to base 2, along every piece up to each token."""
    inner: Tensor | None
    """The same along every chunk."""
    beta: Tensor | None
    """float32"""
    factors: Tensor | None
    """`[H, S, 2]` float32: of what a token writes in a chunk, and of what it reads (`linear_moe.kernels.turned_scan`)."""


def new_sums(heads: int, num_tokens: int, device: torch.device, *, exact: bool) -> Tensor:
    """Room for sums of log decays, `[H, S]`. A difference of sums is a small number made of large ones: `exact` results need it
    in float64.
    """
    return torch.empty(heads, num_tokens, dtype=torch.float64 if exact else torch.float32, device=device)


def gates_by_head(
    log_decay: Tensor | None, beta: Tensor | None, borders: Tensor, piece: int, *, chunk: int | None = None, exact: bool,
    factors: Direction | None = None,
) -> GatesByHead:  # fmt: skip
    """Scalar log decays `[S, H]` summed, and strengths `[S, H]` of any dtype turned, in one pass; what is given.

    `exact` as in `new_sums`. `borders` are those of the pieces, of `piece` tokens, which is a multiple of `chunk`. `factors`:
    of walks in which direction they are wanted.
    """
    given = log_decay if beta is None else beta
    assert given is not None
    num_tokens, heads = given.shape
    sums = None if log_decay is None else new_sums(heads, num_tokens, given.device, exact=exact)
    inner = None if sums is None or chunk is None else torch.empty_like(sums)
    turned = None if beta is None else beta.new_empty(heads, num_tokens, dtype=torch.float32)
    scaled = None
    if factors is not None:
        scaled = torch.empty(heads, num_tokens, 2, dtype=torch.float32, device=given.device)
    made = GatesByHead(sums, inner, turned, scaled)
    launch_kernel(
        _by_head_kernel,
        borders.shape[0],
        log_decay,
        beta,
        *made,
        borders,
        num_tokens,
        HEADS=heads,
        BLOCK=min(1 << (heads - 1).bit_length(), 16),
        PIECE=piece,
        CHUNK=chunk or piece,
        REVERSE=factors == "backwards",
    )
    return made


class SumLaunch(NamedTuple):
    """Launch parameters of a sum of many short rows: a program takes the few columns that are one read of the memory's."""

    rows: int
    columns: int
    num_warps: int


ROWS_SUMMED = SumLaunch(rows=512, columns=16, num_warps=8)
INTERPRETED_SUMS = SumLaunch(rows=64, columns=512, num_warps=8)
"""Of fewer rows and more columns, where a program takes milliseconds."""


@triton.jit
def summed_rows(x_ptr, num_rows, column, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """A few columns of `[num_rows, WIDTH]` float32, summed over all rows, always in one order."""
    row = tl.arange(0, ROWS)
    total = tl.zeros((ROWS, column.shape[0]), tl.float32)
    for first in range(0, num_rows, ROWS):
        inside = (first + row < num_rows)[:, None] & (column < WIDTH)[None, :]
        total += tl.load(x_ptr + (first + row).to(tl.int64)[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _sum_rows_kernel(x_ptr, sum_ptr, num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = summed_rows(x_ptr, num_rows, column, WIDTH, ROWS)
    tl.store(sum_ptr + column, total.to(sum_ptr.dtype.element_ty), mask=column < WIDTH)


def sum_launch(rows: Tensor) -> SumLaunch:
    """How `rows` `[R, *]` are summed."""
    launch = ROWS_SUMMED if rows.is_cuda else INTERPRETED_SUMS
    return launch._replace(rows=block_of(rows.shape[0], launch.rows))


def sum_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What many programs each made a part of: `[R, *]` float32, contiguous, summed to `[*]` of `dtype`, always in one order.

    torch's sum takes 28 us on an H100 for 12 MB.
    """
    total = x.new_empty(x.shape[1:], dtype=dtype)
    if total.numel():
        rows, columns, num_warps = sum_launch(x)
        launch_kernel(
            _sum_rows_kernel, cdiv(total.numel(), columns), x, total, x.shape[0], WIDTH=total.numel(), ROWS=rows,
            COLUMNS=columns, num_warps=num_warps,
        )  # fmt: skip
    return total


def block_of(size: int, largest: int | None = None) -> int:
    """The power of two, at least 16 (what a product of tiles needs), that holds `size`, or `largest` if that is less."""
    block = max(16, 1 << (size - 1).bit_length())
    return block if largest is None else min(block, largest)


def new_states(count: int, k: Tensor, v: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Room for `count` states of every head, `[count, H, K, V]`, whatever torch's default dtype is."""
    return torch.empty(count, v.shape[1], k.shape[2], v.shape[2], dtype=dtype, device=k.device)


def new_folded_states(chunks: int, length: int, k: Tensor, v: Tensor) -> Tensor:
    """Room for the states of chunks of C = `length` tokens, in the dtype of k, by blocks of C keys and C values.

    Blocks of the same values are a tensor as keys are, of a token for each key of a block: `[V / C, chunks * C, H, K]`, K and V
    rounded up to whole blocks. So a gradient of keys can take the memory of the blocks it is made of.
    """
    blocks = [cdiv(size, length) for size in (v.shape[2], k.shape[2])]
    return k.new_empty(blocks[0], chunks * length, v.shape[1], blocks[1] * length)


LINE = 128
"""Bytes of what a GPU's caches hold and its memory is read by."""


def new_rows(like: Tensor, rows: int, columns: int) -> Tensor:
    """Room for `[rows, columns]` of the dtype of `like`, where each row begins a line, if that takes little more room.

    Lines that rows share are read and written in parts. On an H100 a pass over 1,024 of 2,056 bfloat16 columns takes a quarter
    longer, and a pass that also writes them four fifths.
    """
    line = LINE // like.element_size()
    apart = cdiv(columns, line) * line
    return like.new_empty(rows, apart if 8 * apart <= 9 * columns else columns)[:, :columns]


def sum_heads(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient `[S, H, K]` float32 summed over the value heads that share a key head, in the shape and dtype of `like`."""
    return gradient.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype)


def cdiv(total: int, part: int) -> int:
    """Parts that hold `total`. Plain arithmetic: Triton's own costs microseconds a call on the host."""
    return -(-total // part)


def tile_of(size: int, tile: int, dtype: torch.dtype) -> int:
    """Channels of a program's tile: no more than hold `size` in float32, always `tile` in 16 bits, masked past the end.

    At one pipeline stage triton 3.6 compiles a walk with a 16-bit tile of 32 channels and a state of 256 rows to one that reads
    outside its shared memory on Hopper.
    """
    return block_of(size, tile) if dtype == torch.float32 else tile


def tile_choices(size: int, whole: int, dtype: torch.dtype) -> tuple[int, ...]:
    """What `tile_of` may be given for `size` channels: of 16 bits none that it warns of, and the next after `size` at most.

    A state of the tile times `whole` channels, in registers, is of no more than 128 times 128: one of twice that spills, and
    takes minutes to compile.
    """
    tiles = (16, 32, 64) if dtype == torch.float32 else (64, 128)
    most = min(block_of(size), 128 * 128 // block_of(whole))
    return tuple(tile for tile in tiles if tile == tiles[0] or tile <= most)


def precision_of(dtype: torch.dtype) -> str:
    """How tiles are multiplied: float32 exactly, 16 bits as they are."""
    return "ieee" if dtype == torch.float32 else "tf32"


def inverse_precision_of(dtype: torch.dtype) -> str:
    """How a triangle is inverted, in float32. Tensor cores cut numbers to tf32, of which float16 has every bit: what is cut
    off at each doubling is a float16 result's error, of keys in few dimensions six of its roundings. bfloat16 has three fewer.
    """
    return "tf32x3" if dtype == torch.float16 else precision_of(dtype)


@functools.cache
def _cuda_processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def num_processors(device: torch.device) -> int:
    """Multiprocessors to fill."""
    if device.type == "cuda":
        return _cuda_processors(device.index or 0)
    # The interpreter: small enough that tests of a few hundred tokens are split.
    return 8
