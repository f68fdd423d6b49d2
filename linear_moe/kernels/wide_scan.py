"""The scalar scan of wide heads, K or V above 128, where nothing is kept for a backward pass: one walk.

`linear_moe.kernels.parallel_scan` stores states in a walk and reads from them after it: keys and values come from memory twice,
and states go there and back. Here a program walks the chunks of one (piece of a segment, head, tile of value channels) as in
`linear_moe.kernels.scalar_walks`, its state in registers. What makes 256 keys of it fit there:

    - the state is transposed, `[values, keys]`, so that it is the left factor of what is read from it: from registers, never
      from shared memory, which is left to three chunks ahead
    - it is in two halves of the keys, of which one at a time has a copy that is rounded to 16 bits
    - inputs are loaded by descriptors of tensors, which a GPU's tensor memory accelerator follows: there are no addresses of
      rows, and no masks, for past a piece's end and past the last channel it reads 0

With S the state before a chunk, and s_j the sum of its log decays up to token j, to base 2,

    P_ji = <k_j, q_i> 2^(s_i - s_j) for j <= i
    o_i  = 2^s_i S^T q_i + sum_j P_ji v_j
    S   <- 2^s_C S + sum_j k_j (2^(s_C - s_j) v_j)^T

take an exponential a pair. As long as decays are mild, one a token is enough: with m the sum at the chunk's middle, a decay is
a factor of what is read by one token and a factor of what is written by the other,

    w_j = 2^(m - s_j) v_j
    o_i = 2^(s_i - m) ((2^m S)^T q_i + sum_{j <= i} <k_j, q_i> w_j)
    2^m S <- 2^m S + sum_j k_j w_j^T

and what the state lacks at the end, 2^(s_C - m), is carried on to the next chunk's 2^m. What is rounded is another multiple of
the same numbers by up to `LIMIT` powers of 2, which bfloat16 and float32 have room for; float16, which has not, takes pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.forms import Decay
from linear_moe.kernels import piece_reads
from linear_moe.kernels.blocks import (
    HEAD_DECAY,
    NO_DECAY,
    SCALAR_DECAY,
    block_of,
    cdiv,
    decay_between,
    decay_of,
    decay_where,
    load_numbers,
    load_start,
    new_states,
    precision_of,
    rate_of,
    rows_left,
    state_offsets,
    store_rows,
    tile_of,
    walk_at,
    zero_uncovered,
)
from linear_moe.kernels.descriptors import describable, described_rows
from linear_moe.kernels.launch import launch_kernel
from linear_moe.kernels.launch_tables import LaunchTable
from linear_moe.kernels.parallel_scan import plan_of, starts_of
from linear_moe.kernels.results import Forward
from linear_moe.kernels.splits import Ragged
from linear_moe.static_tensors import static

LIMIT = tl.constexpr(40.0)
"""How far, to base 2, a chunk of a mild decay may fade. No factor is then above 2^40 or below 2^-40, of the 2^126 that float32
and bfloat16 have either way: two thirds of them are left for what is scaled. A token fades to 0.65 on average. Float16 has no
such range."""


class Launch(NamedTuple):
    """Launch parameters."""

    chunk: int
    """Tokens that are read and written at a time."""
    value_tile: int
    """Value channels of a program."""
    num_warps: int
    num_stages: int


def choose_launch(dtype: torch.dtype) -> Launch:
    """From a frozen table, measured on an H100 (torch 2.11, triton 3.6, bf16; ms at B8 T4096 H4 K = V = 256).

    0.125 without a decay, 0.163 with one a head and 0.172 with one a token, if they are mild; the two steps of `parallel_scan`
    take 0.207 to 0.216. Of prototypes, with 2 stages 0.184, 0.203, 0.215; with faded pairs 0.205, 0.211; on 8 warps with
    chunks of 128 and 1 stage 0.241, 0.279, 0.310.
    """
    if dtype == torch.float32:
        # Exact products take no tensor cores, and the tiles twice the memory.
        return Launch(chunk=16, value_tile=16, num_warps=4, num_stages=1)
    return Launch(chunk=64, value_tile=64, num_warps=4, num_stages=3)


TABLE = LaunchTable(
    "wide_scan",
    lambda decay, key_dim, value_dim, dtype: choose_launch(dtype),
    lambda decay, key_dim, value_dim, dtype: {
        "num_warps": (4, 8),
        "num_stages": (1, 2) if dtype == torch.float32 else (2, 3),
    },
)
"""By the decay, K, V and the dtype."""


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether heads are wide, and descriptors can describe what they are in."""
    return piece_reads.takes(k.shape[2], v.shape[2], k.dtype) and describable(q, k, v)


@static
def _numbers(count: int, device: torch.device) -> Tensor:
    """From 1 on, float32."""
    return torch.arange(1, count + 1, dtype=torch.float32, device=device)


@triton.jit
def sums_of_chunk(
    sums_ptr, numbers_ptr, rate, done, rows, num_rows, CHUNK: tl.constexpr, DECAY: tl.constexpr, THREADS: tl.constexpr
):
    """Sums of a chunk's log decays, to base 2, up to each row, to its middle, and over its `num_rows` rows.

    Those of a constant decay are made of `numbers`, which like sums of others come from memory: numbers that a program makes
    itself it makes anew for every layout that they are wanted in.
    """
    if DECAY == HEAD_DECAY:
        summed = rate * load_numbers(numbers_ptr, rows, None, THREADS)
        middle = rate * (CHUNK // 2)
        total = rate * num_rows
    else:
        base = sums_ptr + done
        # Rows past the last keep its sum: their decays must not overflow.
        summed = load_numbers(base, tl.minimum(rows, num_rows - 1), None, THREADS)
        middle = tl.load(base + tl.minimum(CHUNK // 2, num_rows) - 1)
        total = tl.load(base + num_rows - 1)
    return summed, middle, total


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
def walk(
    q_rows, k_rows, v_rows, sums_ptr, numbers_ptr, o_ptr, low, high, rate, start, begin, end, size, head, tile, scale,
    HEADS: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr, V_TILE: tl.constexpr,
    DECAY: tl.constexpr, MILD: tl.constexpr, IN_FULL: tl.constexpr, THREADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state's halves after chunks `begin` to `end`, whose reads are stored."""
    rows = tl.arange(0, CHUNK)
    values = tile * V_TILE + tl.arange(0, V_TILE)
    seen = rows[:, None] <= rows[None, :]
    carry = tl.zeros((), tl.float64 if PRECISION == "ieee" else tl.float32)
    for chunk in range(begin, end):
        done = chunk * CHUNK
        num_rows = rows_left(size, done, CHUNK, IN_FULL)
        q_low, q_high = q_rows.load([done, 0]), q_rows.load([done, HALF])
        k_low, k_high = k_rows.load([done, 0]), k_rows.load([done, HALF])
        v = tl.trans(v_rows.load([done, tile * V_TILE]))
        written = v
        if DECAY != NO_DECAY:
            summed, middle, total = sums_of_chunk(
                sums_ptr, numbers_ptr, rate, done, rows, num_rows, CHUNK, DECAY, THREADS
            )
            if MILD:
                fades = decay_of(carry + middle)
                low *= fades
                high *= fades
                carry = total - middle
                written = (v.to(tl.float32) * decay_of(middle - summed)[None, :]).to(v.dtype)
        pairs = tl.dot(k_low, tl.trans(q_low), input_precision=PRECISION)
        pairs = tl.dot(k_high, tl.trans(q_high), acc=pairs, input_precision=PRECISION)
        if MILD:
            pairs = tl.where(seen, pairs, 0.0)
        else:
            pairs *= decay_where(seen, summed[None, :], summed[:, None])
        # Before the next product: its sums take their registers.
        pairs = pairs.to(v.dtype)
        o = tl.dot(low.to(v.dtype), tl.trans(q_low), input_precision=PRECISION)
        o = tl.dot(high.to(v.dtype), tl.trans(q_high), acc=o, input_precision=PRECISION)
        if not MILD:
            o *= decay_of(summed)[None, :]
        o = tl.dot(written, pairs, acc=o, input_precision=PRECISION)
        if MILD and DECAY != NO_DECAY:
            o *= (scale * decay_of(summed - middle))[None, :]
        else:
            o *= scale
        store_rows(o_ptr, tl.trans(o.to(v.dtype)), start + done, head, HEADS, V, rows, values, rows < num_rows)
        if not MILD:
            fades = decay_of(total)
            low *= fades
            high *= fades
            written = (v.to(tl.float32) * decay_between(total, summed)[None, :]).to(v.dtype)
        low = tl.dot(written, k_low, acc=low, input_precision=PRECISION)
        high = tl.dot(written, k_high, acc=high, input_precision=PRECISION)
    if MILD and DECAY != NO_DECAY:
        low *= decay_of(carry)
        high *= decay_of(carry)
    return low, high


@triton.jit
def wide_scan_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    decay_ptr,
    numbers_ptr,
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
    HALF: tl.constexpr,
    V_TILE: tl.constexpr,
    DECAY: tl.constexpr,
    RANGE: tl.constexpr,
    IN_FULL: tl.constexpr,
    THREADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A null pointer leaves its part out. RANGE: whether the dtype has room for what a mild decay scales."""
    TILES: tl.constexpr = (V + V_TILE - 1) // V_TILE
    tile, head, piece, start, size = walk_at(order_ptr, borders_ptr, borders_stride, HEADS, TILES)
    k_head = head // (HEADS // K_HEADS)
    keys = tl.arange(0, HALF)
    values = tile * V_TILE + tl.arange(0, V_TILE)
    q_rows = described_rows(q_ptr, start, size, k_head, K_HEADS, K, CHUNK, HALF)
    k_rows = described_rows(k_ptr, start, size, k_head, K_HEADS, K, CHUNK, HALF)
    v_rows = described_rows(v_ptr, start, size, head, HEADS, V, CHUNK, V_TILE)
    low = load_start(
        initial_ptr, joined_ptr, owner_ptr, first_ptr, piece, head, HEADS, values, keys, V, K, True, False
    )  # fmt: skip
    high = load_start(
        initial_ptr, joined_ptr, owner_ptr, first_ptr, piece, head, HEADS, values, HALF + keys, V, K, True, False
    )  # fmt: skip
    rate = rate_of(decay_ptr, head, DECAY, PRECISION)
    sums_ptr = decay_ptr
    if DECAY == SCALAR_DECAY:
        sums_ptr += head.to(tl.int64) * num_tokens + start
    num_chunks = tl.cdiv(size, CHUNK)
    mild = num_chunks
    if DECAY != NO_DECAY:
        mild *= RANGE
        if RANGE:
            mild = tl.where(strongest_decay(sums_ptr, rate, size, CHUNK, DECAY) >= -LIMIT, num_chunks, 0)
    # One after the other, of which one has nothing to do: a loop with a branch inside makes no pipeline, and two branches may
    # have memory of their own each.
    low, high = walk(
        q_rows, k_rows, v_rows, sums_ptr, numbers_ptr, o_ptr, low, high, rate, start, 0, mild, size, head, tile, scale,
        HEADS, V, CHUNK, HALF, V_TILE, DECAY, True, IN_FULL, THREADS, PRECISION,
    )  # fmt: skip
    if DECAY != NO_DECAY:
        low, high = walk(
            q_rows, k_rows, v_rows, sums_ptr, numbers_ptr, o_ptr, low, high, rate, start, mild, num_chunks, size, head, tile,
            scale, HEADS, V, CHUNK, HALF, V_TILE, DECAY, False, IN_FULL, THREADS, PRECISION,
        )  # fmt: skip
    if final_ptr is not None:
        at = state_offsets(piece, head, HEADS, values, keys, V, K, True)
        inside = (values < V)[:, None]
        tl.store(final_ptr + at, low, mask=inside & (keys < K)[None, :])
        tl.store(final_ptr + at + HALF * V, high, mask=inside & (HALF + keys < K)[None, :])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    ragged: Ragged,
    *,
    decay: Decay,
    scale: float,
    want_final: bool,
) -> Forward:
    """As `linear_moe.kernels.parallel_scan.forward`, without `starts`."""
    key_dim, value_dim = k.shape[2], v.shape[2]
    launch = TABLE.pick(v.device, decay.value, key_dim, value_dim, k.dtype)
    plan = plan_of(k, v, log_decay, decay, ragged, chunk=launch.chunk)
    value_tile = tile_of(value_dim, launch.value_tile, k.dtype)
    starts = starts_of(plan, k, v, initial_state)
    ends = new_states(plan.walks.num_pieces, k, v) if want_final else None
    output = torch.empty_like(v)
    walked = plan.walks.all
    launch_kernel(
        wide_scan_kernel,
        walked.num_pieces * plan.pieces.heads * cdiv(value_dim, value_tile),
        q,
        k,
        v,
        plan.inner if decay is Decay.SCALAR else plan.pieces.decays,
        _numbers(launch.chunk, v.device) if decay is Decay.HEAD else None,
        output,
        *starts.arguments(),
        ends,
        *walked.arguments(),
        v.shape[0],
        scale,
        HEADS=plan.pieces.heads,
        K_HEADS=k.shape[1],
        K=key_dim,
        V=value_dim,
        CHUNK=launch.chunk,
        HALF=max(block_of(key_dim) // 2, 16),
        V_TILE=value_tile,
        DECAY=plan.pieces.kind,
        RANGE=k.dtype != torch.float16,
        IN_FULL=plan.pieces.in_full,
        THREADS=32 * launch.num_warps,
        PRECISION=precision_of(k.dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    if not ragged.dense:
        zero_uncovered(output, ragged.cu_seqlens)
    return Forward(output, None if ends is None else plan.walks.ends(ends), None)
