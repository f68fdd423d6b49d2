"""What tokens read from the state that their piece starts from and from the piece's other tokens, all pieces in parallel.

With G the sums of the log decays from a piece's start, and S_0 the state before it,

    o_t = r_t (f e^G_t <a_t, S_0> + sum_{j <= t} e^(G_t - G_j) w_j (f_1 <a_t, b_j> c_j + f_2 <a_t, b2_j> c2_j))

or backwards in time, over j >= t and from the state after the piece. It is the second step of `parallel_scan` and of the delta
rule's scans; the first walks and stores the states, rounded to the inputs' dtype as a read would round them. A stored state of
`[K, V]` numbers costs a piece of 256 tokens a quarter of the traffic of its own q, k, v and o at K = V = 256.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import (
    DECAY_NAMES,
    HEAD_DECAY,
    NO_DECAY,
    block_of,
    load_rows,
    pair_decays,
    piece_of,
    precision_of,
    state_offsets,
    store_rows,
    summed_decays,
)
from linear_moe.kernels.launch import launch_kernel
from linear_moe.kernels.launch_tables import LaunchTable
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

    0.147; 2 stages 0.183, columns of 64 0.166. With 64 rows and 4 warps, 2 stages 0.162, 3 stages 0.187, slices of 32 0.184;
    with 8 warps and columns of 64 0.237. Pieces of 128 gain a tenth here, and cost the first step twice the states; of 512 they
    cost a quarter. Fading pairs of other blocks by a factor a token, in loops of their own, made all reads of a gated delta
    rule's passes 8% slower: the second pair of loops takes registers that spill.
    """
    if dtype == torch.float32:
        # Exact products take no tensor cores, and the tiles twice the memory.
        return Launch(piece=64, rows=32, columns=32, slice=16, num_warps=4, num_stages=1)
    return Launch(piece=256, rows=128, columns=32, slice=64, num_warps=8, num_stages=3)


TABLE = LaunchTable(
    "piece_reads",
    lambda decay, weighted, key_dim, value_dim, dtype: choose_launch(dtype),
    lambda decay, weighted, key_dim, value_dim, dtype: {
        "rows": (32, 64) if dtype == torch.float32 else (64, 128),
        "columns": (16, 32) if dtype == torch.float32 else (32, 64),
        "slice": (16, 32) if dtype == torch.float32 else (32, 64),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
    },
)
"""By the decay, whether pairs are weighted (the delta rules' are: "weighted" or "plain"), the widths of a and c, and the dtype.
The piece is the frozen table's: it is how many states are kept for the backward pass."""


def takes(key_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """Whether storing states and reading in parallel is faster than a walk that reads and writes."""
    return dtype != torch.float32 and max(key_dim, value_dim) > 128


@triton.jit
def _add_pairs(
    o, own, a, row, summed, rate, b_ptr, c_ptr, decay_ptr, weight_ptr, start, size, head, num_tokens, factor, begin, end,
    HEADS: tl.constexpr, B_HEADS: tl.constexpr, C_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    COLUMNS: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
    APART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`o` with the pairs of columns `begin` to `end` added. APART: a token's own pair is not, but summed up in `own`."""
    keys = tl.arange(0, K_BLOCK)
    values = tl.arange(0, V_BLOCK)
    b_head = head // (HEADS // B_HEADS)
    c_head = head // (HEADS // C_HEADS)
    for first in range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        there = column < size
        b = load_rows(b_ptr, start, b_head, B_HEADS, K, column, keys, there)
        c = load_rows(c_ptr, start, c_head, C_HEADS, V, column, values, there)
        products = factor * tl.dot(a, tl.trans(b), input_precision=PRECISION)
        if weight_ptr is not None:
            weights = tl.load(weight_ptr + head.to(tl.int64) * num_tokens + start + column, mask=there, other=0.0)
            products *= weights[None, :]
        seen = row[:, None] <= column[None, :] if REVERSE else row[:, None] >= column[None, :]
        if APART:
            mine = row[:, None] == column[None, :]
            own += tl.sum(tl.where(mine, products, 0.0), 1)
            seen = seen & (row[:, None] != column[None, :])
        if DECAY != NO_DECAY:
            others, _ = summed_decays(decay_ptr, rate, head, start, column, size, num_tokens, DECAY)
            if REVERSE:
                products *= pair_decays(others[None, :], summed[:, None], seen)
            else:
                products *= pair_decays(summed[:, None], others[None, :], seen)
        products = tl.where(seen, products, 0.0).to(c.dtype)
        o = tl.dot(products, c, acc=o, input_precision=PRECISION)
    return o, own


@triton.jit
def reads_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    b2_ptr,
    c2_ptr,
    decay_ptr,
    column_weight_ptr,
    row_weight_ptr,
    states_ptr,
    o_ptr,
    other_ptr,
    overlap_ptr,
    borders_ptr,
    borders_stride,
    num_tokens,
    state_factor,
    factor,
    factor2,
    HEADS: tl.constexpr,
    A_HEADS: tl.constexpr,
    B_HEADS: tl.constexpr,
    C_HEADS: tl.constexpr,
    B2_HEADS: tl.constexpr,
    C2_HEADS: tl.constexpr,
    OTHER_HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    TRANSPOSED_STATE: tl.constexpr,
    STRICT: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A null pointer leaves its part out. STRICT: without a token's own pair; the second pairs always are."""
    BLOCKS: tl.constexpr = PIECE // ROWS
    program = tl.program_id(0)
    # The longest first: what a block reads of its own piece grows with its place in it.
    block = program % BLOCKS if REVERSE else BLOCKS - 1 - program % BLOCKS
    head = (program // BLOCKS) % HEADS
    piece = (program // (BLOCKS * HEADS)).to(tl.int64)
    start, size = piece_of(borders_ptr, borders_stride, piece)
    if block * ROWS >= size:
        return
    a_head = head // (HEADS // A_HEADS)
    row = block * ROWS + tl.arange(0, ROWS)
    keys = tl.arange(0, K_BLOCK)
    values = tl.arange(0, V_BLOCK)
    valid = row < size
    at = head.to(tl.int64) * num_tokens + start + row
    rate = 0.0
    if DECAY == HEAD_DECAY:
        rate = tl.load(decay_ptr + head)
        if PRECISION == "ieee":
            rate = rate.to(tl.float64)

    o = tl.zeros((ROWS, V_BLOCK), tl.float32)
    for channel in range(0, K, SLICE):
        some = channel + tl.arange(0, SLICE)
        part = load_rows(a_ptr, start, a_head, A_HEADS, K, row, some, valid)
        state_at = state_offsets(piece, head, HEADS, some, values, K, V, TRANSPOSED_STATE)
        state = tl.load(states_ptr + state_at, mask=(some < K)[:, None] & (values < V)[None, :], other=0.0)
        o = tl.dot(part, state, acc=o, input_precision=PRECISION)
    o *= state_factor
    summed = tl.zeros((ROWS,), tl.float32)
    if DECAY != NO_DECAY:
        summed, total = summed_decays(decay_ptr, rate, head, start, row, size, num_tokens, DECAY)
        if REVERSE:
            o *= tl.exp(tl.minimum(total - summed, 0.0).to(tl.float32))[:, None]
        else:
            o *= tl.exp(summed.to(tl.float32))[:, None]

    a = load_rows(a_ptr, start, a_head, A_HEADS, K, row, keys, valid)
    own = tl.zeros((ROWS,), tl.float32)
    begin = block * ROWS if REVERSE else 0
    end = size if REVERSE else tl.minimum((block + 1) * ROWS, size)
    # A token's own pair crosses nothing: it is added after the overlap is taken.
    APART: tl.constexpr = STRICT or overlap_ptr is not None
    o, own = _add_pairs(
        o, own, a, row, summed, rate, b_ptr, c_ptr, decay_ptr, column_weight_ptr, start, size, head, num_tokens, factor,
        begin, end, HEADS, B_HEADS, C_HEADS, K, V, COLUMNS, K_BLOCK, V_BLOCK, DECAY, REVERSE, APART, PRECISION,
    )  # fmt: skip
    if b2_ptr is not None:
        nothing = tl.zeros((ROWS,), tl.float32)
        o, _ = _add_pairs(
            o, nothing, a, row, summed, rate, b2_ptr, c2_ptr, decay_ptr, column_weight_ptr, start, size, head, num_tokens,
            factor2, begin, end, HEADS, B2_HEADS, C2_HEADS, K, V, COLUMNS, K_BLOCK, V_BLOCK, DECAY, REVERSE, True, PRECISION,
        )  # fmt: skip
    if row_weight_ptr is not None:
        weights = tl.load(row_weight_ptr + at, mask=valid, other=0.0)
        o *= weights[:, None]
        own *= weights
    if overlap_ptr is not None:
        other_head = head // (HEADS // OTHER_HEADS)
        other = load_rows(other_ptr, start, other_head, OTHER_HEADS, V, row, values, valid)
        tl.store(overlap_ptr + at, tl.sum(o * other.to(tl.float32), 1), mask=valid)
        if not STRICT:
            c = load_rows(c_ptr, start, head // (HEADS // C_HEADS), C_HEADS, V, row, values, valid)
            o += own[:, None] * c.to(tl.float32)
    if ADD:
        o += load_rows(o_ptr, start, head, HEADS, V, row, values, valid).to(tl.float32)
    store_rows(o_ptr, o, start, head, HEADS, V, row, values, valid)


class Pieces(NamedTuple):
    """What all reads of one call have in common."""

    splits: Splits
    """The pieces."""
    kind: int
    """Of decay, as `blocks.DECAY_KINDS` numbers it."""
    decays: Tensor | None
    """The log decays `[H]`, or their sums from each piece's start `[H, S]`."""
    heads: int


def read_pieces(
    pieces: Pieces,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor,
    output: Tensor,
    *,
    factor: float,
    state_factor: float | None = None,
    second: tuple[Tensor, Tensor, float] | None = None,
    column_weights: Tensor | None = None,
    row_weights: Tensor | None = None,
    reverse: bool = False,
    transposed_state: bool = False,
    strict: bool = False,
    add: bool = False,
    other: Tensor | None = None,
    overlap: Tensor | None = None,
) -> None:
    """The module's equation.

    Args:
        pieces: the pieces and their decays.
        a: `[S, *, K]`, as b; what reads.
        b: `[S, *, K]`; what is read with.
        c: `[S, *, V]`; what is read. Any may have fewer heads than there are.
        states: `[P, H, K, V]`, or `[P, H, V, K]` if `transposed_state`: before each piece, or in `reverse` after it.
        output: `[S, H, V]`, written to, or added to if `add`.
        factor: f_1, on the pairs; and f, on the state's read, unless `state_factor` is given.
        state_factor: f
        second: b2, c2 and f_2; pairs of a token with itself are left out.
        column_weights: w `[H, S]` float32, or None for 1.
        row_weights: r `[H, S]` float32, or None for 1.
        reverse: backwards in time.
        transposed_state: how the states lie.
        strict: leave out a token's own pair.
        add: to what `output` holds.
        other: `[S, *, V]`, with `overlap`.
        overlap: `[H, S]` float32, to be filled with <output, other> without each token's own pair.
    """
    key_dim, value_dim = a.shape[2], c.shape[2]
    weighted = "plain" if column_weights is None and row_weights is None else "weighted"
    launch = TABLE.pick(a.device, DECAY_NAMES[pieces.kind], weighted, key_dim, value_dim, a.dtype)
    b2, c2, factor2 = (None, None, 0.0) if second is None else second
    borders = pieces.splits.borders
    launch_kernel(
        reads_kernel,
        pieces.splits.num_pieces * pieces.heads * (launch.piece // launch.rows),
        a,
        b,
        c,
        b2,
        c2,
        pieces.decays,
        column_weights,
        row_weights,
        states,
        output,
        other,
        overlap,
        borders,
        borders.stride(0),
        c.shape[0],
        factor if state_factor is None else state_factor,
        factor,
        factor2,
        HEADS=pieces.heads,
        A_HEADS=a.shape[1],
        B_HEADS=b.shape[1],
        C_HEADS=c.shape[1],
        B2_HEADS=1 if b2 is None else b2.shape[1],
        C2_HEADS=1 if c2 is None else c2.shape[1],
        OTHER_HEADS=1 if other is None else other.shape[1],
        K=key_dim,
        V=value_dim,
        PIECE=launch.piece,
        ROWS=launch.rows,
        COLUMNS=launch.columns,
        K_BLOCK=block_of(key_dim),
        V_BLOCK=block_of(value_dim),
        SLICE=launch.slice,
        DECAY=pieces.kind,
        REVERSE=reverse,
        TRANSPOSED_STATE=transposed_state,
        STRICT=strict,
        ADD=add,
        PRECISION=precision_of(a.dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
