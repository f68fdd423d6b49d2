"""What tokens read from the state that their piece starts from and from the piece's other tokens, all pieces in parallel.

With G the sums of the log decays from a piece's start, and S_0 the state before it,

    o_t = f (e^G_t <a_t, S_0> + sum_{j <= t} e^(G_t - G_j) w_j <a_t, b_j> c_j)

or backwards in time, over j >= t and from the state after the piece. It is the second step of `parallel_scan` and of the delta
rule's scans; the first walks and stores the states, rounded to the inputs' dtype as a read would round them. A stored state of
`[K, V]` numbers costs a piece of 256 tokens a quarter of the traffic of its own q, k, v and o at K = V = 256. The gradients are
made of such reads as well (`linear_moe.kernels.piece_gradients`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import (
    DECAY_NAMES,
    NO_DECAY,
    block_of,
    decay_between,
    decay_of,
    decay_where,
    load_numbers,
    load_rows,
    piece_of,
    precision_of,
    rate_of,
    rows_left,
    state_offsets,
    store_rows,
    summed_decays,
)
from linear_moe.kernels.launch import launch_kernel
from linear_moe.kernels.launch_tables import Choices, LaunchTable
from linear_moe.kernels.splits import Splits


class Launch(NamedTuple):
    """Launch parameters."""

    piece: int
    """Tokens between two stored states."""
    rows: int
    """Tokens that a program reads for."""
    columns: int
    """Tokens that it reads at a time."""
    slice: int
    """Channels of the state that it reads at a time."""
    num_warps: int
    num_stages: int


def choose_launch(dtype: torch.dtype) -> Launch:
    """From a frozen table, measured on an H100 (torch 2.11, triton 3.6, bf16; ms of a read at B8 T4096 H4 K = V = 256).

    0.129; 3 stages 0.134, slices of 32 0.134, columns of 16 0.140, columns of 64 and 2 stages 0.147; with 64 rows, 4 warps,
    columns of 16 and slices of 32 0.138, 5 stages 0.135. Of an older form, 0.147 with 3 stages: 2 stages 0.183, columns of
    64 0.166. With 64 rows and 4 warps, 2 stages 0.162, 3 stages 0.187, slices of 32 0.184; with 8 warps and columns of 64
    0.237. Pieces of 128 gain a tenth here, and cost the first step twice the states; of 512 they cost a quarter. Fading
    pairs of other blocks by a factor a token, in loops of their own, made all reads of a gated delta rule's passes 8%
    slower: the second pair of loops takes registers that spill.
    """
    if dtype == torch.float32:
        # Exact products take no tensor cores, and the tiles twice the memory.
        return Launch(piece=64, rows=32, columns=32, slice=16, num_warps=4, num_stages=1)
    return Launch(piece=256, rows=128, columns=32, slice=64, num_warps=8, num_stages=4)


def choices(dtype: torch.dtype) -> Choices:
    """What else may be launched."""
    return {
        "rows": (32, 64) if dtype == torch.float32 else (64, 128),
        "columns": (16, 32) if dtype == torch.float32 else (32, 64),
        "slice": (16, 32) if dtype == torch.float32 else (32, 64),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3, 4),
    }


TABLE = LaunchTable(
    "piece_reads",
    lambda decay, weighted, key_dim, value_dim, dtype: choose_launch(dtype),
    lambda decay, weighted, key_dim, value_dim, dtype: choices(dtype),
)
"""By the decay, whether pairs are weighted (the delta rules' are: "weighted" or "plain"), K, V and the dtype.
The piece is the frozen table's: it is how many states are kept for the backward pass."""


def takes(key_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """Whether storing states and reading in parallel is faster than a walk that reads and writes."""
    return dtype != torch.float32 and max(key_dim, value_dim) > 128


@triton.jit
def read_state(
    o, a_ptr, states_ptr, start, piece, head, row, valid,
    HEADS: tl.constexpr, A_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr,
    SLICE: tl.constexpr, TRANSPOSED_STATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`o` with what rows of `a` read from a stored state added."""
    values = tl.arange(0, V_BLOCK)
    channels = tl.arange(0, SLICE)
    STEP: tl.constexpr = 1 if TRANSPOSED_STATE else V
    for first in range(0, K, SLICE):
        # Only a scalar moves, where slices are whole: no address is made anew.
        if K % SLICE == 0:
            moved, some = first, channels
        else:
            moved, some = 0, first + channels
        part = load_rows(a_ptr + moved, start, head // (HEADS // A_HEADS), A_HEADS, K, row, some, valid)
        state_at = moved * STEP + state_offsets(piece, head, HEADS, some, values, K, V, TRANSPOSED_STATE)
        if K % SLICE == 0 and V == V_BLOCK:
            state = tl.load(states_ptr + state_at)
        else:
            mask = (some < K)[:, None] & (values < V)[None, :]
            state = tl.load(states_ptr + state_at, mask=mask, other=0.0)
        o = tl.dot(part, state, acc=o, input_precision=PRECISION)
    return o


@triton.jit
def add_pairs(
    o, own, a, row, summed, rate, b_ptr, c_ptr, decay_ptr, weight_ptr, start, size, head, num_tokens, factor, begin, end,
    HEADS: tl.constexpr, B_HEADS: tl.constexpr, C_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    COLUMNS: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, DECAY: tl.constexpr, IN_FULL: tl.constexpr,
    REVERSE: tl.constexpr, APART: tl.constexpr, THREADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`o` with the pairs of columns `begin` to `end` added. APART: a token's own pair is not, but summed up in `own`, and, of
    weighted pairs, what rounding takes from them: of keys nearly parallel it would add up, and theirs is nearly the token's.
    """
    keys = tl.arange(0, K_BLOCK)
    values = tl.arange(0, V_BLOCK)
    b_head = head // (HEADS // B_HEADS)
    c_head = head // (HEADS // C_HEADS)
    for first in range(begin, end, COLUMNS):
        each = tl.arange(0, COLUMNS)
        column = first + each
        there = each < rows_left(size, first, COLUMNS, IN_FULL)
        b = load_rows(b_ptr, start + first, b_head, B_HEADS, K, each, keys, there)
        c = load_rows(c_ptr, start + first, c_head, C_HEADS, V, each, values, there)
        products = factor * tl.dot(a, tl.trans(b), input_precision=PRECISION)
        if weight_ptr is not None:
            weights = load_numbers(weight_ptr + head.to(tl.int64) * num_tokens + start, column, there, THREADS)
            products *= weights[None, :]
        seen = row[:, None] <= column[None, :] if REVERSE else row[:, None] >= column[None, :]
        if APART:
            mine = row[:, None] == column[None, :]
            own += tl.sum(tl.where(mine, products, 0.0), 1)
            seen = seen & (row[:, None] != column[None, :])
        if DECAY == NO_DECAY:
            products = tl.where(seen, products, 0.0)
        else:
            others, _ = summed_decays(decay_ptr, rate, head, start, column, size, num_tokens, DECAY, THREADS)
            if REVERSE:
                products *= decay_where(seen, others[None, :], summed[:, None])
            else:
                products *= decay_where(seen, summed[:, None], others[None, :])
        rounded = products.to(c.dtype)
        if APART and weight_ptr is not None:
            own += tl.sum(products - rounded.to(tl.float32), 1)
        o = tl.dot(rounded, c, acc=o, input_precision=PRECISION)
    return o, own


@triton.jit
def begin_rows(
    a_ptr, states_ptr, decay_ptr, start, size, piece, head, row, rate, num_tokens, factor, HEADS: tl.constexpr,
    A_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, SLICE: tl.constexpr,
    DECAY: tl.constexpr, IN_FULL: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED_STATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What some rows of a piece read from its state; the rows of `a`; and the sums of their decays."""
    valid = row < size
    o = tl.zeros((row.shape[0], V_BLOCK), tl.float32)
    o = read_state(o, a_ptr, states_ptr, start, piece, head, row, valid, HEADS, A_HEADS, K, V, V_BLOCK, SLICE,
                   TRANSPOSED_STATE, PRECISION)  # fmt: skip
    o *= factor
    summed = tl.zeros((row.shape[0],), tl.float32)
    if DECAY != NO_DECAY:
        summed, total = summed_decays(decay_ptr, rate, head, start, row, size, num_tokens, DECAY)
        if REVERSE:
            o *= decay_between(total, summed)[:, None]
        else:
            o *= decay_of(summed)[:, None]
    return o, load_rows(a_ptr, start, head // (HEADS // A_HEADS), A_HEADS, K, row, tl.arange(0, K_BLOCK), valid), summed


@triton.jit
def read_rows(
    a_ptr, b_ptr, c_ptr, states_ptr, decay_ptr, weight_ptr, start, size, piece, head, row, rate, num_tokens, begin, end, factor,
    HEADS: tl.constexpr, A_HEADS: tl.constexpr, B_HEADS: tl.constexpr, C_HEADS: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, COLUMNS: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, SLICE: tl.constexpr,
    DECAY: tl.constexpr, IN_FULL: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED_STATE: tl.constexpr, APART: tl.constexpr,
    THREADS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The module's equation for some rows of a piece, from columns `begin` to `end`: o, and with APART what is left of it."""
    o, a, summed = begin_rows(
        a_ptr, states_ptr, decay_ptr, start, size, piece, head, row, rate, num_tokens, factor, HEADS, A_HEADS, K, V, K_BLOCK,
        V_BLOCK, SLICE, DECAY, IN_FULL, REVERSE, TRANSPOSED_STATE, PRECISION,
    )  # fmt: skip
    return add_pairs(
        o, tl.zeros((row.shape[0],), tl.float32), a, row, summed, rate, b_ptr, c_ptr, decay_ptr, weight_ptr, start, size, head,
        num_tokens, factor, begin, end, HEADS, B_HEADS, C_HEADS, K, V, COLUMNS, K_BLOCK, V_BLOCK, DECAY, IN_FULL, REVERSE,
        APART, THREADS, PRECISION,
    )  # fmt: skip


@triton.jit
def _halves(o):
    """Columns of a tile, the left ones and the right ones. No thread gives any of its own away."""
    HALF: tl.constexpr = o.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(o, (o.shape[0], 2, HALF)), (0, 2, 1)))


@triton.jit
def quarters(o):
    """Columns of a tile, a fourth each, in their order."""
    left, right = _halves(o)
    first, second = _halves(left)
    third, fourth = _halves(right)
    return first, second, third, fourth


@triton.jit
def _store_columns(
    o, along, less, values_ptr, v_ptr, o_ptr, start, row, valid, head, FIRST: tl.constexpr, HEADS: tl.constexpr,
    V: tl.constexpr,
):  # fmt: skip
    # Some columns of a block may be past the width, or all.
    if FIRST < V:
        columns = FIRST + tl.arange(0, o.shape[1])
        o += along[:, None] * load_rows(values_ptr, start, head, HEADS, V, row, columns, valid).to(tl.float32)
        o -= less[:, None] * load_rows(v_ptr, start, head, HEADS, V, row, columns, valid).to(tl.float32)
        store_rows(o_ptr, o, start, head, HEADS, V, row, columns, valid)


@triton.jit
def reads_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    decay_ptr,
    weight_ptr,
    states_ptr,
    along_ptr,
    values_ptr,
    o_ptr,
    borders_ptr,
    borders_stride,
    num_tokens,
    scale,
    HEADS: tl.constexpr,
    Q_HEADS: tl.constexpr,
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
    """A null pointer leaves its part out. `along` `[2, HEADS, S]`: times what a token adds of its row of `values`, and takes
    away of its row of `v`.
    """
    BLOCKS: tl.constexpr = PIECE // ROWS
    program = tl.program_id(0)
    # The longest first: what a block reads of its own piece grows with its place in it.
    block = BLOCKS - 1 - program % BLOCKS
    head = (program // BLOCKS) % HEADS
    piece = (program // (BLOCKS * HEADS)).to(tl.int64)
    start, size = piece_of(borders_ptr, borders_stride, piece)
    if block * ROWS >= size:
        return
    size = rows_left(size, 0, PIECE, IN_FULL)
    row = block * ROWS + tl.arange(0, ROWS)
    rate = rate_of(decay_ptr, head, DECAY, PRECISION)
    o, _ = read_rows(
        q_ptr, k_ptr, v_ptr, states_ptr, decay_ptr, weight_ptr, start, size, piece, head, row, rate, num_tokens, 0,
        tl.minimum((block + 1) * ROWS, size), scale, HEADS, Q_HEADS, K_HEADS, HEADS, K, V, COLUMNS, K_BLOCK, V_BLOCK, SLICE,
        DECAY, IN_FULL, False, False, False, THREADS, PRECISION,
    )  # fmt: skip
    valid = row < size
    if along_ptr is None:
        store_rows(o_ptr, o, start, head, HEADS, V, row, tl.arange(0, V_BLOCK), valid)
    else:
        numbers = along_ptr + start + row
        along = scale * tl.load(numbers + head.to(tl.int64) * num_tokens, mask=valid, other=0.0)
        less = scale * tl.load(numbers + (HEADS + head).to(tl.int64) * num_tokens, mask=valid, other=0.0)
        QUARTER: tl.constexpr = V_BLOCK // 4
        first, second, third, fourth = quarters(o)
        _store_columns(first, along, less, values_ptr, v_ptr, o_ptr, start, row, valid, head, 0, HEADS, V)
        _store_columns(second, along, less, values_ptr, v_ptr, o_ptr, start, row, valid, head, QUARTER, HEADS, V)
        _store_columns(third, along, less, values_ptr, v_ptr, o_ptr, start, row, valid, head, 2 * QUARTER, HEADS, V)
        _store_columns(fourth, along, less, values_ptr, v_ptr, o_ptr, start, row, valid, head, 3 * QUARTER, HEADS, V)


class Pieces(NamedTuple):
    """What all reads of one call have in common."""

    splits: Splits
    """The pieces."""
    kind: int
    """Of decay, as `blocks.DECAY_KINDS` numbers it."""
    decays: Tensor | None
    """The log decays `[H]`, or their sums from each piece's start `[H, S]`."""
    heads: int
    in_full: bool
    """Whether every piece has as many tokens as the first."""

    def constants(self, launch: Launch, k: Tensor, v: Tensor) -> dict[str, Any]:
        """Of a kernel with reads."""
        return {
            "HEADS": self.heads,
            "K_HEADS": k.shape[1],
            "K": k.shape[2],
            "V": v.shape[2],
            "PIECE": launch.piece,
            "ROWS": launch.rows,
            "COLUMNS": launch.columns,
            "K_BLOCK": block_of(k.shape[2]),
            "V_BLOCK": block_of(v.shape[2]),
            "SLICE": launch.slice,
            "DECAY": self.kind,
            "IN_FULL": self.in_full,
            "THREADS": 32 * launch.num_warps,
            "PRECISION": precision_of(k.dtype),
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
        }

    def num_programs(self, launch: Launch) -> int:
        """One for some rows of every piece of every head."""
        return self.splits.num_pieces * self.heads * (launch.piece // launch.rows)


def read_pieces(
    pieces: Pieces,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    states: Tensor,
    output: Tensor,
    *,
    scale: float,
    weights: Tensor | None,
    along: Tensor | None = None,
    values: Tensor | None = None,
) -> None:
    """Fill `output` by the module's equation, with q, k and v for a, b and c.

    Args:
        pieces: the pieces and their decays.
        q: `[S, *, K]`, as k. May have fewer heads than there are.
        k: `[S, *, K]`
        v: `[S, H, V]`; with the delta rule, what a write finds wrong.
        states: `[P, H, K, V]`, before each piece.
        output: `[S, H, V]`
        scale: f
        weights: w `[H, S]` float32, or None for 1.
        along: `[2, H, S]` float32, times what of `values` is added and of v taken away, both before f; or None for nothing.
        values: `[S, H, V]`, if there is `along`.
    """
    weighted = "plain" if weights is None else "weighted"
    launch = TABLE.pick(q.device, DECAY_NAMES[pieces.kind], weighted, q.shape[2], v.shape[2], q.dtype)
    borders = pieces.splits.borders
    launch_kernel(
        reads_kernel, pieces.num_programs(launch), q, k, v, pieces.decays, weights, states, along, values, output,
        borders, borders.stride(0), v.shape[0], scale, Q_HEADS=q.shape[1], **pieces.constants(launch, k, v),
    )  # fmt: skip
