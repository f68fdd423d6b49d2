"""The join of transitions: from what each piece does to a state, the state at every border.

A piece of a recurrence without erase takes S to Diag(exp(total)) S + increment. Joining pieces in order, forwards or backwards
in time, gives the state that each starts from and the last one; the same join serves pieces of one GPU's sequence, chunks of
a prefill, and parts of a sequence on several GPUs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import block_of, cdiv, num_processors, sum_dtype, sum_of_products
from linear_moe.kernels.launch import launch_kernel
from linear_moe.kernels.splits import Splits

JOIN_BLOCKS = 4096, 1024
"""Numbers of a state that a program joins: the first of which there are two programs a multiprocessor, or the last."""
AFFINE_TILE = 32
FEW_VALUES = 16
"""Value channels of a program that takes the state whole. Measured on an H100 (torch 2.11, triton 3.6; us of eight pieces of 16
heads, K = V = 128): 20.7, with 2 stages 22.6; 32 channels 26.6, on 4 warps 52, on 16 57; 64 channels 39."""
MOST_DIRECT = 128
"""Keys up to which inexact products take the state whole, from registers; of more, a few rows at a time from memory."""


class Starts(NamedTuple):
    """The states that the walks of pieces start from, float32; `linear_moe.kernels.blocks.load_start` reads them."""

    initial: Tensor | None = None
    """`[N, H, K, V]` of the outermost piece of each segment, its first, or its last backwards in time; None: zeros."""
    joined: Tensor | None = None
    """`[P, H, K, V]` of the other pieces, anything for those; None where all segments are whole."""
    splits: Splits | None = None
    """The pieces."""

    def arguments(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Of a kernel: the states, the segment of each piece and the first piece of each segment."""
        if self.joined is None:
            return self.initial, None, None, None
        assert self.splits is not None
        return self.initial, self.joined, self.splits.owner, self.splits.first


FROM_ZEROS = Starts()


def _new_starts(increments: Tensor) -> Tensor:
    """Room for what pieces start from. Of a segment's outermost and of pieces of no segment it is nothing in particular."""
    return torch.empty_like(increments)


@triton.jit
def _join_kernel(
    increments_ptr,
    totals_ptr,
    initial_ptr,
    starts_ptr,
    final_ptr,
    first_ptr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    SIZE: tl.constexpr = K * V
    NUM_BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    block = program % NUM_BLOCKS
    head = (program // NUM_BLOCKS) % HEADS
    segment = (program // (NUM_BLOCKS * HEADS)).to(tl.int64)
    numbers = block * BLOCK + tl.arange(0, BLOCK)
    inside = numbers < SIZE
    at_segment = (segment * HEADS + head) * SIZE + numbers
    first = tl.load(first_ptr + segment)
    count = (tl.load(first_ptr + segment + 1) - first).to(tl.int32)
    passed = count - 1 if final_ptr is None else count
    if passed == 0:
        return
    if initial_ptr is not None:
        state = tl.load(initial_ptr + at_segment, mask=inside, other=0.0)
    else:
        state = tl.zeros((BLOCK,), tl.float32)
    for step in range(passed):
        piece = first + (count - 1 - step if REVERSE else step)
        at = (piece * HEADS + head) * SIZE + numbers
        tl.store(starts_ptr + at, state, mask=inside)
        if PER_CHANNEL:
            total = tl.load(totals_ptr + (piece * HEADS + head) * K + numbers // V, mask=inside, other=0.0)
        else:
            total = tl.load(totals_ptr + piece * HEADS + head)
        state = tl.exp(total) * state + tl.load(increments_ptr + at, mask=inside, other=0.0)
    if final_ptr is not None:
        tl.store(final_ptr + at_segment, state, mask=inside)
    else:
        last = first + (0 if REVERSE else count - 1)
        tl.store(starts_ptr + (last * HEADS + head) * SIZE + numbers, state, mask=inside)


def join(
    increments: Tensor,
    totals: Tensor,
    initial_state: Tensor | None,
    splits: Splits,
    *,
    reverse: bool = False,
    want_final: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Join the pieces' transitions of every segment in order.

    Args:
        increments: `[P, H, K, V]` float32: each piece's final state from a start of zeros.
        totals: `[P, H]` or, with a decay a key channel, `[P, H, K]` float32: the sum of each piece's log decays.
        initial_state: `[N, H, K, V]` float32, or None for zeros: of a segment's first piece, or its last in `reverse`.
        splits: the pieces of the segments.
        reverse: walk the pieces from a segment's last to its first.
        want_final: without it the transition of the piece that a segment is left by is not looked at.

    Returns:
        The state each piece starts from `[P, H, K, V]`, anything for a segment's outermost and for pieces of no segment; and
        the one after each segment's last `[N, H, K, V]`, if wanted; float32.
    """
    assert splits.first is not None
    num_segments = splits.first.numel() - 1
    _, heads, K, V = increments.shape
    starts = _new_starts(increments)
    final = increments.new_empty(num_segments, heads, K, V) if want_final else None
    states, wanted = num_segments * heads, 2 * num_processors(increments.device)
    block = next((b for b in JOIN_BLOCKS if states * cdiv(K * V, b) >= wanted), JOIN_BLOCKS[-1])
    launch_kernel(
        _join_kernel,
        states * cdiv(K * V, block),
        increments,
        totals,
        initial_state,
        starts,
        final,
        splits.first,
        HEADS=heads,
        K=K,
        V=V,
        PER_CHANNEL=totals.dim() == 3,
        BLOCK=block,
        REVERSE=reverse,
    )
    return starts, final


@triton.jit
def _join_affine_kernel(
    increments_ptr,
    transitions_ptr,
    initial_ptr,
    starts_ptr,
    final_ptr,
    first_ptr,
    row_stride,
    column_stride,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    K_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    NUM_TILES: tl.constexpr = (V + TILE - 1) // TILE
    WIDE: tl.constexpr = sum_dtype(PRECISION)
    program = tl.program_id(0)
    values = (program % NUM_TILES) * TILE + tl.arange(0, TILE)
    head = (program // NUM_TILES) % HEADS
    segment = (program // (NUM_TILES * HEADS)).to(tl.int64)
    keys = tl.arange(0, K_BLOCK)
    inside = (keys < K)[:, None] & (values < V)[None, :]
    at = keys[:, None] * V + values[None, :]
    first = tl.load(first_ptr + segment)
    count = (tl.load(first_ptr + segment + 1) - first).to(tl.int32)
    passed = count - 1 if final_ptr is None else count
    if passed == 0:
        return
    if initial_ptr is not None:
        state = tl.load(initial_ptr + (segment * HEADS + head) * K * V + at, mask=inside, other=0.0)
    else:
        state = tl.zeros((K_BLOCK, TILE), tl.float32)
    for step in range(passed):
        piece = (first + (count - 1 - step if REVERSE else step)) * HEADS + head
        tl.store(starts_ptr + piece * K * V + at, state, mask=inside)
        if STEP == K_BLOCK:
            moves_at = piece * K * K + keys[:, None] * row_stride + keys[None, :] * column_stride
            moves = tl.load(transitions_ptr + moves_at, mask=(keys < K)[:, None] & (keys < K)[None, :], other=0.0)
            increment = tl.load(increments_ptr + piece * K * V + at, mask=inside, other=0.0)
            state = sum_of_products(moves, state, increment, PRECISION).to(tl.float32)
        else:
            # What was just stored is read again a few rows at a time: a product's operand can't be cut out of registers.
            tl.debug_barrier()
            sum = tl.load(increments_ptr + piece * K * V + at, mask=inside, other=0.0).to(WIDE)
            for key in range(0, K, STEP):
                some = key + tl.arange(0, STEP)
                moves_at = piece * K * K + keys[:, None] * row_stride + some[None, :] * column_stride
                moves = tl.load(transitions_ptr + moves_at, mask=(keys < K)[:, None] & (some < K)[None, :], other=0.0)
                rows_at = piece * K * V + some[:, None] * V + values[None, :]
                rows = tl.load(starts_ptr + rows_at, mask=(some < K)[:, None] & (values < V)[None, :], other=0.0)
                sum = sum_of_products(moves, rows, sum, PRECISION)
            state = sum.to(tl.float32)
    if final_ptr is not None:
        tl.store(final_ptr + (segment * HEADS + head) * K * V + at, state, mask=inside)
    else:
        last = (first + (0 if REVERSE else count - 1)) * HEADS + head
        tl.store(starts_ptr + last * K * V + at, state, mask=inside)


def join_affine(
    increments: Tensor,
    transitions: Tensor,
    initial_state: Tensor | None,
    splits: Splits,
    *,
    reverse: bool = False,
    want_final: bool = True,
    exact: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`join` for a recurrence with erase, whose pieces take S to transition @ S + increment.

    Args:
        increments: `[P, H, K, V]` float32.
        transitions: `[P, H, K, K]` float32; its last two dims may be transposed.
        initial_state: `[N, H, K, V]` float32, or None for zeros.
        splits: the pieces of the segments.
        reverse: walk the pieces from a segment's last to its first.
        want_final: as in `join`.
        exact: whether to multiply in float64, so that each piece rounds a state once, or in three tensor-core products that
            leave off the last bits of float32.

    Returns:
        As `join`.
    """
    assert splits.first is not None
    num_segments = splits.first.numel() - 1
    _, heads, K, V = increments.shape
    starts = _new_starts(increments)
    final = increments.new_empty(num_segments, heads, K, V) if want_final else None
    block = block_of(K)
    # Of more keys a state and what it is multiplied by do not fit the registers; exact products take more of them.
    direct = block <= (AFFINE_TILE if exact else MOST_DIRECT)
    tile = AFFINE_TILE if exact or not direct else FEW_VALUES
    launch_kernel(
        _join_affine_kernel,
        num_segments * heads * cdiv(V, tile),
        increments,
        transitions,
        initial_state,
        starts,
        final,
        splits.first,
        *transitions.stride()[2:],
        HEADS=heads,
        K=K,
        V=V,
        K_BLOCK=block,
        TILE=tile,
        STEP=block if direct else AFFINE_TILE,
        REVERSE=reverse,
        PRECISION="ieee" if exact else "tf32x3",
        num_warps=8 if direct else 4,
        num_stages=2 if direct and exact else 3,
    )
    return starts, final
