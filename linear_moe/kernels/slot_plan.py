"""The plan of a mixture: slots sorted by (memory, sequence), each pair's in the order of time, by a counting sort.

Tokens come sequence by sequence, so slots that are sorted stably by memory alone are sorted by sequence too: there are as
many bins as memories, and one for pads, however many sequences there are. Every block of slots counts its bins; a walk along
the blocks says where each block's slots of each bin begin; a slot's place is as many after that as its block has slots of its
bin before it. Where a sequence begins among the slots of a memory is found by bisection.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import cdiv
from linear_moe.kernels.launch import launch_kernel


class Launch(NamedTuple):
    """Launch parameters of the four kernels."""

    block: int
    """Slots that are counted together, and compared each with each: work a slot grows with it, counts shrink."""
    columns: int
    """Slots that a block is compared with at once."""
    bins: int
    """Bins counted at once."""
    blocks: int
    """Blocks that a walk takes at once."""
    borders: int
    """Borders of a program."""
    num_warps: int


# Measured on an H100 (torch 2.11, triton 3.6; us of the count, the walk and the place at 98,304 slots and 5 memories): 2.3, 2.7
# and 6.1; with blocks of 128 on 4 warps 2.0, 2.0 and 10.1, of 256 on 8 warps 1.9, 1.9 and 19.1; with 16 columns 7.0 for the
# place. With 65 memories 7.3, 2.7 and 7.4. The borders take 7.2.
LAUNCH = Launch(block=64, columns=32, bins=32, blocks=2048, borders=64, num_warps=2)
MOST_SLOTS = 2**31 - 1
"""Counts are int32."""


class SlotPlan(NamedTuple):
    """Where each slot goes, where each segment begins, and how many slots each memory got."""

    order: Tensor
    """`[R]` int64: the slot at each sorted place."""
    place: Tensor
    """`[R]` int64: the sorted place of each slot."""
    cu_seqlens: Tensor
    """`[N + 1]` int64: where each (memory, sequence) begins; pads trail behind the last."""
    slots: Tensor
    """`[num_states]` int64: slots of each memory, those of pads left out."""
    source: Tensor
    """`[R]` int64: the token of the slot at each sorted place."""
    segment: Tensor
    """`[R]` int32: its segment, N of a pad's."""
    ends: Tensor
    """`[num_states]` int32: where each memory's places end."""


@triton.jit
def _bins_of(memory_ptr, sequence_ptr, slot, num_slots, num_states, num_sequences, FAN_OUT: tl.constexpr):
    """The memory of each slot, int32: `num_states` for a pad's, one more past the last slot."""
    exists = slot < num_slots
    memory = tl.load(memory_ptr + slot, mask=exists, other=0)
    sequence = tl.load(sequence_ptr + slot // FAN_OUT, mask=exists, other=0)
    bins = tl.where(sequence < num_sequences, memory, num_states)
    return tl.where(exists, bins, num_states + 1).to(tl.int32)


@triton.jit
def _count_kernel(
    memory_ptr, sequence_ptr, upto_ptr, num_slots, num_states, num_sequences, num_blocks, FAN_OUT: tl.constexpr,
    BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """How many slots of a block are in each bin or one below it: their sum over blocks is where the next bin begins."""
    block = tl.program_id(0).to(tl.int64)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    bins = _bins_of(memory_ptr, sequence_ptr, slot, num_slots, num_states, num_sequences, FAN_OUT)
    for first in range(0, num_states + 1, BINS):
        each = first + tl.arange(0, BINS)
        upto = tl.sum((bins[None, :] <= each[:, None]).to(tl.int32), 1)
        tl.store(upto_ptr + each.to(tl.int64) * num_blocks + block, upto, mask=each <= num_states)


@triton.jit
def _walk_kernel(upto_ptr, begin_ptr, slots_ptr, ends_ptr, num_states, num_blocks, BLOCKS: tl.constexpr):
    """Where the slots that each block has in one bin begin."""
    this = tl.program_id(0).to(tl.int64)
    here = this * num_blocks
    below = here - num_blocks
    # The first bin has none below it.
    blocks_below = tl.where(this > 0, num_blocks, 0)
    carry = tl.full((), 0, tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        carry += tl.sum(tl.load(upto_ptr + below + block, mask=block < blocks_below, other=0), 0)
    begin = carry
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        inside = block < num_blocks
        count = tl.load(upto_ptr + here + block, mask=inside, other=0)
        count -= tl.load(upto_ptr + below + block, mask=block < blocks_below, other=0)
        tl.store(begin_ptr + here + block, carry + tl.cumsum(count, 0) - count, mask=inside)
        carry += tl.sum(count, 0)
    if this < num_states:
        tl.store(slots_ptr + this, (carry - begin).to(tl.int64))
        tl.store(ends_ptr + this, carry)


@triton.jit
def _place_kernel(
    memory_ptr, sequence_ptr, begin_ptr, order_ptr, place_ptr, source_ptr, segment_ptr, num_slots, num_states, num_sequences,
    num_blocks, FAN_OUT: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    first = block * BLOCK
    row = tl.arange(0, BLOCK)
    bins = _bins_of(memory_ptr, sequence_ptr, first + row, num_slots, num_states, num_sequences, FAN_OUT)
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, BLOCK, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        others = _bins_of(memory_ptr, sequence_ptr, first + column, num_slots, num_states, num_sequences, FAN_OUT)
        before = (others[None, :] == bins[:, None]) & (column[None, :] < row[:, None])
        rank += tl.sum(before.to(tl.int32), 1)
    slot = first + row
    exists = slot < num_slots
    begin = tl.load(begin_ptr + bins.to(tl.int64) * num_blocks + block, mask=exists, other=0)
    place = (begin + rank).to(tl.int64)
    tl.store(place_ptr + slot, place, mask=exists)
    tl.store(order_ptr + place, slot, mask=exists)
    token = slot // FAN_OUT
    tl.store(source_ptr + place, token, mask=exists)
    # A pad's bin is the number of memories.
    sequence = tl.where(bins < num_states, tl.load(sequence_ptr + token, mask=exists, other=0), 0).to(tl.int32)
    tl.store(segment_ptr + place, bins * num_sequences + sequence, mask=exists)


@triton.jit
def _borders_kernel(
    sequence_ptr, begin_ptr, order_ptr, cu_seqlens_ptr, num_borders, sequences_each, num_states, num_blocks, steps,
    FAN_OUT: tl.constexpr, BORDERS: tl.constexpr,
):  # fmt: skip
    border = tl.program_id(0).to(tl.int64) * BORDERS + tl.arange(0, BORDERS)
    exists = border < num_borders
    memory, sequence = border // sequences_each, border % sequences_each
    low = tl.load(begin_ptr + memory * num_blocks, mask=exists, other=0)
    # A memory's first sequence begins where it does, and so do the pads, which have the last border.
    searched = exists & (sequence > 0)
    high = tl.load(begin_ptr + (memory + 1) * num_blocks, mask=searched, other=0)
    for _ in range(steps):
        apart = searched & (low < high)
        middle = low + (high - low) // 2
        slot = tl.load(order_ptr + middle, mask=apart, other=0)
        before = tl.load(sequence_ptr + slot // FAN_OUT, mask=apart, other=0) < sequence
        low = tl.where(apart & before, middle + 1, low)
        high = tl.where(apart & ~before, middle, high)
    tl.store(cu_seqlens_ptr + border, low.to(tl.int64), mask=exists)


def sort(memory: Tensor, sequence: Tensor, num_states: int, num_sequences: int) -> SlotPlan:
    """Sort the slots of `memory` `[S, F]` int64, flattened, by memory and then by `sequence` `[S]` int64 of their token.

    A token whose sequence is `num_sequences` is a pad; what memories it has means nothing. Of the others the sequences must
    not decrease, and the memories must be below `num_states`: neither is looked at.
    """
    num_slots, fan_out = memory.numel(), memory.shape[1]
    order, place, source = (memory.new_empty(num_slots) for _ in range(3))
    segment = memory.new_empty(num_slots, dtype=torch.int32)
    num_borders = num_states * num_sequences + 1
    if num_slots == 0:
        borders, slots = memory.new_zeros(num_borders), memory.new_zeros(num_states)
        return SlotPlan(order, place, borders, slots, source, segment, slots.to(torch.int32))
    launch = LAUNCH
    num_blocks = cdiv(num_slots, launch.block)
    upto, begin = (memory.new_empty(num_states + 1, num_blocks, dtype=torch.int32) for _ in range(2))
    slots, cu_seqlens = memory.new_empty(num_states), memory.new_empty(num_borders)
    ends = memory.new_empty(num_states, dtype=torch.int32)
    sizes = (num_slots, num_states, num_sequences, num_blocks)
    launch_kernel(
        _count_kernel,
        num_blocks,
        memory,
        sequence,
        upto,
        *sizes,
        FAN_OUT=fan_out,
        BLOCK=launch.block,
        BINS=min(launch.bins, 1 << num_states.bit_length()),
        num_warps=launch.num_warps,
    )
    launch_kernel(
        _walk_kernel,
        num_states + 1,
        upto,
        begin,
        slots,
        ends,
        num_states,
        num_blocks,
        BLOCKS=launch.blocks,
        num_warps=launch.num_warps,
    )
    launch_kernel(
        _place_kernel,
        num_blocks,
        memory,
        sequence,
        begin,
        order,
        place,
        source,
        segment,
        *sizes,
        FAN_OUT=fan_out,
        BLOCK=launch.block,
        COLUMNS=launch.columns,
        num_warps=launch.num_warps,
    )
    launch_kernel(
        _borders_kernel,
        cdiv(num_borders, launch.borders),
        sequence,
        begin,
        order,
        cu_seqlens,
        num_borders,
        max(num_sequences, 1),
        num_states,
        num_blocks,
        num_slots.bit_length(),
        FAN_OUT=fan_out,
        BORDERS=launch.borders,
        num_warps=launch.num_warps,
    )
    return SlotPlan(order, place, cu_seqlens, slots, source, segment, ends)
