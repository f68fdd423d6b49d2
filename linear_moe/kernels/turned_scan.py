"""The scan of `linear_moe.kernels.scalar_walks` with its state turned, of heads of more than 64 channels.

A program walks the chunks of one (piece of a segment, head, tile of value channels), its state in registers, and in bfloat16
reads it without a way through shared memory:

    - the state is `[values, keys]`, so that it is the left factor of what is read from it: from registers, and shared memory is
      left to three chunks ahead
    - of more than 128 keys it is in two halves, of which one at a time has a copy that is rounded to 16 bits
    - inputs are loaded by descriptors of tensors, which a GPU's tensor memory accelerator follows: there are no addresses of
      rows, and no masks, for past a piece's end and past the last channel it reads 0

With S the state before a chunk, and s_j the sum of its log decays up to token j, to base 2,

    P_ji = <k_j, q_i> 2^(s_i - s_j) for j <= i
    o_i  = 2^s_i S^T q_i + sum_j P_ji v_j
    S   <- 2^s_C S + sum_j k_j (2^(s_C - s_j) v_j)^T

take an exponential a pair. As long as decays are mild, one a token is enough: seen from the chunk's end, a decay is a factor
f_j = 2^(s_C - s_j) of what one token writes and 1 / f_i of what another reads,

    S   <- 2^s_C S
    o_i  = (S^T q_i + sum_{j <= i} <k_j, q_i> f_j v_j) / f_i
    S   <- S + sum_j k_j (f_j v_j)^T

and back in time, seen from the chunk's start, the same with f_j = 2^s_j. Both factors of a token are made before the walk, for
which an exponential is dear: a scheduler has one or two warps, and nothing else to do while they wait. What is rounded is
another multiple of the same numbers by up to `LIMIT` powers of 2 (`linear_moe.kernels.blocks`), which bfloat16 and float32 have
room for; float16, which has not, takes pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import (
    HEAD_DECAY,
    NO_DECAY,
    SCALAR_DECAY,
    block_of,
    cdiv,
    decay_between,
    decay_of,
    decay_where,
    is_mild,
    load_numbers,
    load_start,
    precision_of,
    rate_of,
    rows_left,
    state_offsets,
    store_factors,
    store_rows,
    tile_of,
    walk_at,
    wants_factors,
)
from linear_moe.kernels.descriptors import described_rows
from linear_moe.kernels.join import Starts
from linear_moe.kernels.launch import launch_kernel
from linear_moe.kernels.splits import Walked
from linear_moe.static_tensors import static

MOST_KEYS = 128
"""Of one part of the state."""


class Launch(NamedTuple):
    """Launch parameters."""

    chunk: int
    """Tokens that are read and written at a time."""
    value_tile: int
    """Value channels of a program."""
    num_warps: int
    num_stages: int


@static
def _numbers(count: int, device: torch.device) -> Tensor:
    """From 1 on, float32."""
    return torch.arange(1, count + 1, dtype=torch.float32, device=device)


@triton.jit
def factors_of_heads_kernel(
    decay_ptr, factors_ptr, CHUNK: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr
):
    head = tl.program_id(0)
    rows = tl.arange(0, CHUNK)
    rate = rate_of(decay_ptr, head, HEAD_DECAY, PRECISION)
    left = rate * (rows + 1 if REVERSE else CHUNK - 1 - rows)
    store_factors(factors_ptr, head * CHUNK + rows, left, None)


def factors_of_heads(log_decay: Tensor, chunk: int, *, reverse: bool, precision: str) -> Tensor:
    """`[H, chunk, 2]` float32, a token's factors in a whole chunk, of constant decays `[H]`."""
    made = torch.empty(log_decay.numel(), chunk, 2, dtype=torch.float32, device=log_decay.device)
    launch_kernel(
        factors_of_heads_kernel, log_decay.numel(), log_decay, made, CHUNK=chunk, REVERSE=reverse, PRECISION=precision,
        num_warps=2,
    )  # fmt: skip
    return made


@triton.jit
def sums_of_chunk(sums_ptr, numbers_ptr, rate, done, rows, num_rows, DECAY: tl.constexpr, THREADS: tl.constexpr):
    """Sums of a chunk's log decays, to base 2, up to each row and over its `num_rows` rows.

    Those of a constant decay are made of `numbers`, which like sums of others come from memory: numbers that a program makes
    itself it makes anew for every layout that they are wanted in.
    """
    if DECAY == HEAD_DECAY:
        summed = rate * load_numbers(numbers_ptr, rows, None, THREADS)
        total = rate * num_rows
    else:
        # Rows past the last keep its sum: their decays must not overflow.
        summed = load_numbers(sums_ptr + done, tl.minimum(rows, num_rows - 1), None, THREADS)
        total = tl.load(sums_ptr + done + num_rows - 1)
    return summed, total


@triton.jit
def walk(
    q_rows, k_rows, v_rows, sums_ptr, numbers_ptr, factors_ptr, o_ptr, low, high, rate, start, begin, end, size, head, tile,
    scale, HEADS: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, HALVES: tl.constexpr,
    V_TILE: tl.constexpr, DECAY: tl.constexpr, MILD: tl.constexpr, REVERSE: tl.constexpr, IN_FULL: tl.constexpr,
    THREADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state's halves after `begin` to `end` of the chunks that are walked, whose reads are stored."""
    FACTORS: tl.constexpr = MILD and DECAY != NO_DECAY
    rows = tl.arange(0, CHUNK)
    values = tile * V_TILE + tl.arange(0, V_TILE)
    if REVERSE:
        seen = rows[:, None] >= rows[None, :]
    else:
        seen = rows[:, None] <= rows[None, :]
    for step in range(begin, end):
        chunk = tl.cdiv(size, CHUNK) - 1 - step if REVERSE else step
        done = chunk * CHUNK
        num_rows = rows_left(size, done, CHUNK, IN_FULL)
        q_low = q_rows.load([done, 0])
        k_low = k_rows.load([done, 0])
        if HALVES == 2:
            q_high = q_rows.load([done, KEYS])
            k_high = k_rows.load([done, KEYS])
        v = tl.trans(v_rows.load([done, tile * V_TILE]))
        if FACTORS:
            if DECAY == HEAD_DECAY:
                written = load_numbers(factors_ptr, 2 * rows, None, THREADS)
                total = rate * (num_rows if REVERSE else CHUNK)
            else:
                # Rows past the last have its factors: none overflows.
                row = tl.minimum(rows, num_rows - 1)
                written = load_numbers(factors_ptr + 2 * done, 2 * row, None, THREADS)
                total = tl.load(sums_ptr + done + num_rows - 1)
        elif DECAY != NO_DECAY:
            summed, total = sums_of_chunk(sums_ptr, numbers_ptr, rate, done, rows, num_rows, DECAY, THREADS)
        pairs = tl.dot(k_low, tl.trans(q_low), input_precision=PRECISION)
        if HALVES == 2:
            pairs = tl.dot(k_high, tl.trans(q_high), acc=pairs, input_precision=PRECISION)
        if MILD:
            if DECAY != NO_DECAY:
                pairs *= written[:, None]
                fades = decay_of(total)
                low *= fades
                if HALVES == 2:
                    high *= fades
            pairs = tl.where(seen, pairs, 0.0)
        elif REVERSE:
            pairs *= decay_where(seen, summed[:, None], summed[None, :])
        else:
            pairs *= decay_where(seen, summed[None, :], summed[:, None])
        # Before the next product: its sums take their registers.
        pairs = pairs.to(v.dtype)
        o = tl.dot(low.to(v.dtype), tl.trans(q_low), input_precision=PRECISION)
        if HALVES == 2:
            o = tl.dot(high.to(v.dtype), tl.trans(q_high), acc=o, input_precision=PRECISION)
        if not MILD:
            before = decay_between(total, summed) if REVERSE else decay_of(summed)
            o *= before[None, :]
        o = tl.dot(v, pairs, acc=o, input_precision=PRECISION)
        if FACTORS:
            # Only now, when the registers of what was read are free.
            each = tl.arange(0, 2 * CHUNK)
            if DECAY == HEAD_DECAY:
                factors = load_numbers(factors_ptr, each, None, THREADS)
            else:
                at = 2 * (done + tl.minimum(each // 2, num_rows - 1)) + each % 2
                factors = load_numbers(factors_ptr, at, None, THREADS)
            writes, reads = tl.split(tl.reshape(factors, (CHUNK, 2)))
            o *= (scale * reads)[None, :]
            v = (v.to(tl.float32) * writes[None, :]).to(v.dtype)
        else:
            o *= scale
        store_rows(o_ptr, tl.trans(o.to(v.dtype)), start + done, head, HEADS, V, rows, values, rows < num_rows)
        if not MILD:
            fades = decay_of(total)
            low *= fades
            if HALVES == 2:
                high *= fades
            after = decay_of(summed) if REVERSE else decay_between(total, summed)
            v = (v.to(tl.float32) * after[None, :]).to(v.dtype)
        low = tl.dot(v, k_low, acc=low, input_precision=PRECISION)
        if HALVES == 2:
            high = tl.dot(v, k_high, acc=high, input_precision=PRECISION)
    if FACTORS and DECAY == HEAD_DECAY and not REVERSE and not IN_FULL:
        # The last chunk was walked as if it were whole. Where there was none, size is not below 0.
        late = decay_of(rate * tl.minimum(size - end * CHUNK, 0))
        low *= late
        if HALVES == 2:
            high *= late
    return low, high


@triton.jit
def mild_chunks(sums_ptr, rate, size, CHUNK: tl.constexpr, DECAY: tl.constexpr, FACTORS: tl.constexpr):
    """How many chunks of a walk take decays as factors of a token, which FACTORS allows or not: all of them, or none."""
    chunks = tl.cdiv(size, CHUNK)
    if DECAY != NO_DECAY:
        chunks *= FACTORS
        if FACTORS:
            chunks = tl.where(is_mild(sums_ptr, rate, size, CHUNK, DECAY), chunks, 0)
    return chunks


@triton.jit
def turned_scan_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    decay_ptr,
    numbers_ptr,
    factors_ptr,
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
    state_scale,
    HEADS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    HALVES: tl.constexpr,
    V_TILE: tl.constexpr,
    DECAY: tl.constexpr,
    RANGE: tl.constexpr,
    IN_FULL: tl.constexpr,
    REVERSE: tl.constexpr,
    TRANSPOSED_STATE: tl.constexpr,
    THREADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `linear_moe.kernels.scalar_walks.scan_kernel` with an output. RANGE: whether the dtype has room for what a mild decay
    scales.
    """
    TILES: tl.constexpr = (V + V_TILE - 1) // V_TILE
    # Of states `[K, V]` those `[V, K]` are the transposed.
    TURNED: tl.constexpr = not TRANSPOSED_STATE
    tile, head, piece, start, size = walk_at(order_ptr, borders_ptr, borders_stride, HEADS, TILES)
    keys = tl.arange(0, KEYS)
    values = tile * V_TILE + tl.arange(0, V_TILE)
    q_rows = described_rows(q_ptr, start, size, head // (HEADS // Q_HEADS), Q_HEADS, K, CHUNK, KEYS)
    k_rows = described_rows(k_ptr, start, size, head // (HEADS // K_HEADS), K_HEADS, K, CHUNK, KEYS)
    v_rows = described_rows(v_ptr, start, size, head // (HEADS // V_HEADS), V_HEADS, V, CHUNK, V_TILE)
    low = load_start(
        initial_ptr, joined_ptr, owner_ptr, first_ptr, piece, head, HEADS, values, keys, V, K, TURNED, REVERSE
    )  # fmt: skip
    low /= state_scale
    high = low
    if HALVES == 2:
        high = load_start(
            initial_ptr, joined_ptr, owner_ptr, first_ptr, piece, head, HEADS, values, KEYS + keys, V, K, TURNED, REVERSE
        )  # fmt: skip
        high /= state_scale
    rate = rate_of(decay_ptr, head, DECAY, PRECISION)
    sums_ptr = decay_ptr
    if DECAY == SCALAR_DECAY:
        first_number = head.to(tl.int64) * num_tokens + start
        sums_ptr += first_number
        if RANGE:
            factors_ptr += 2 * first_number
    elif DECAY == HEAD_DECAY:
        if RANGE:
            factors_ptr += head * (2 * CHUNK)
    num_chunks = tl.cdiv(size, CHUNK)
    mild = mild_chunks(sums_ptr, rate, size, CHUNK, DECAY, RANGE)
    # One after the other, of which one has nothing to do: a loop with a branch inside makes no pipeline, and two branches may
    # have memory of their own each.
    if RANGE or DECAY == NO_DECAY:
        low, high = walk(
            q_rows, k_rows, v_rows, sums_ptr, numbers_ptr, factors_ptr, o_ptr, low, high, rate, start, 0, mild, size, head,
            tile, scale, HEADS, V, CHUNK, KEYS, HALVES, V_TILE, DECAY, True, REVERSE, IN_FULL, THREADS, PRECISION,
        )  # fmt: skip
    if DECAY != NO_DECAY:
        low, high = walk(
            q_rows, k_rows, v_rows, sums_ptr, numbers_ptr, factors_ptr, o_ptr, low, high, rate, start, mild, num_chunks, size,
            head, tile, scale, HEADS, V, CHUNK, KEYS, HALVES, V_TILE, DECAY, False, REVERSE, IN_FULL, THREADS, PRECISION,
        )  # fmt: skip
    if final_ptr is not None:
        inside = (values < V)[:, None]
        at = state_offsets(piece, head, HEADS, values, keys, V, K, TURNED)
        tl.store(final_ptr + at, state_scale * low, mask=inside & (keys < K)[None, :])
        if HALVES == 2:
            at = state_offsets(piece, head, HEADS, values, KEYS + keys, V, K, TURNED)
            tl.store(final_ptr + at, state_scale * high, mask=inside & (KEYS + keys < K)[None, :])


def turned_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decays: Tensor | None,
    factors: Tensor | None,
    output: Tensor,
    *,
    kind: int,
    heads: int,
    starts: Starts,
    final: Tensor | None,
    walked: Walked,
    launch: Launch,
    scale: float,
    state_scale: float = 1.0,
    reverse: bool = False,
    transposed_state: bool = False,
    in_full: bool,
) -> None:
    """Scan `q`, `k` `[S, *, K]` and `v` `[S, *, V]` along every piece of `walked` into `output` and `final`, if given.

    `decays` are log decays `[H]`, or the sums of a chunk's `[H, S]`, to base 2; `factors` those that `gates_by_head` makes of
    scalar decays for the same direction.
    """
    num_tokens, _, key_dim = q.shape
    value_dim = v.shape[2]
    roomy = wants_factors(k.dtype)
    precision = precision_of(k.dtype)
    numbers = None
    if kind == HEAD_DECAY.value:
        assert decays is not None
        numbers = _numbers(launch.chunk, v.device)
        if roomy:
            factors = factors_of_heads(decays, launch.chunk, reverse=reverse, precision=precision)
    value_tile = tile_of(value_dim, launch.value_tile, k.dtype)
    keys = block_of(key_dim)
    halves = 2 if keys > MOST_KEYS else 1
    launch_kernel(
        turned_scan_kernel,
        walked.num_pieces * heads * cdiv(value_dim, value_tile),
        q,
        k,
        v,
        decays,
        numbers,
        factors,
        output,
        *starts.arguments(),
        final,
        *walked.arguments(),
        num_tokens,
        scale,
        state_scale,
        HEADS=heads,
        Q_HEADS=q.shape[1],
        K_HEADS=k.shape[1],
        V_HEADS=v.shape[1],
        K=key_dim,
        V=value_dim,
        CHUNK=launch.chunk,
        KEYS=max(keys // halves, 16),
        HALVES=halves,
        V_TILE=value_tile,
        DECAY=kind,
        RANGE=roomy,
        IN_FULL=in_full,
        REVERSE=reverse,
        TRANSPOSED_STATE=transposed_state,
        THREADS=32 * launch.num_warps,
        PRECISION=precision,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
