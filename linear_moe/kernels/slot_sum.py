"""The sum over a token's slots, weighted or not, and the backward pass of the weighted one.

    y_s = a_s + sum_f g_sf r_sf        dr_sf = g_sf dy_s        dg_sf = <dy_s, r_sf>

In float32, in the order of the slots, rounded once. The rows lie in the order of a plan, slot f of token s at `place[s, f]`. A
slot has one token, so its gradient is written where the slot was read, and nothing is added to what another program wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import block_of, cdiv
from linear_moe.kernels.launch import launch_kernel

MOST_ADDENDS = 3


class Launch(NamedTuple):
    """Launch parameters of both passes."""

    forward: int
    """Numbers of a tile of tokens forward."""
    channels: int
    """Of that tile."""
    backward: int
    """Numbers of a tile of one token's slots backward."""
    numbers_per_thread: int
    """Of both tiles."""


# From a frozen table, derived, not measured. 16 numbers a thread are two loads of 16 bytes in bfloat16. Forward a tile of 8
# tokens waits once a slot for the rows of all of them; backward a tile has all slots of a token, so that they are one wait: 4
# slots of 1,024 channels are one tile of 8 warps.
LAUNCH = Launch(forward=2048, channels=256, backward=4096, numbers_per_thread=16)


class Gradients(NamedTuple):
    """Of the loss, by what was summed."""

    slots: Tensor
    weights: Tensor


@triton.jit
def _sum_kernel(
    slots_ptr, place_ptr, weights_ptr, addend_ptr, second_ptr, third_ptr, sum_ptr, place_stride, num_tokens,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, FAN_OUT: tl.constexpr,
):  # fmt: skip
    NUM_TILES: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    channel = (program % NUM_TILES) * BLOCK + tl.arange(0, BLOCK)
    token = (program // NUM_TILES).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_channels, exists = channel < CHANNELS, token < num_tokens
    at = token[:, None] * CHANNELS + channel[None, :]
    inside = exists[:, None] & in_channels[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    if addend_ptr is not None:
        total += tl.load(addend_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if second_ptr is not None:
        total += tl.load(second_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if third_ptr is not None:
        total += tl.load(third_ptr + at, mask=inside, other=0.0).to(tl.float32)
    for f in range(FAN_OUT):
        place = tl.load(place_ptr + token * place_stride + f, mask=exists, other=-1)
        read = tl.load(
            slots_ptr + place[:, None] * CHANNELS + channel[None, :],
            mask=(place >= 0)[:, None] & in_channels[None, :],
            other=0.0,
        ).to(tl.float32)
        if weights_ptr is not None:
            read *= tl.load(weights_ptr + token * FAN_OUT + f, mask=exists, other=0.0)[:, None]
        total += read
    tl.store(sum_ptr + at, total.to(sum_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    d_sum_ptr, slots_ptr, place_ptr, weights_ptr, d_slots_ptr, d_weights_ptr, CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr, FAN_OUT: tl.constexpr, SLOTS_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS_BLOCK)
    exists = slot < FAN_OUT
    place = tl.load(place_ptr + token * FAN_OUT + slot, mask=exists, other=0)
    weight = tl.load(weights_ptr + token * FAN_OUT + slot, mask=exists, other=0.0)
    products = tl.zeros((SLOTS_BLOCK, COLUMNS), tl.float32)
    for first in range(0, CHANNELS, COLUMNS):
        channel = first + tl.arange(0, COLUMNS)
        in_channels = channel < CHANNELS
        inside = exists[:, None] & in_channels[None, :]
        at = place[:, None] * CHANNELS + channel[None, :]
        d_sum = tl.load(d_sum_ptr + token * CHANNELS + channel, mask=in_channels, other=0.0).to(tl.float32)[None, :]
        products += d_sum * tl.load(slots_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_slots_ptr + at, (weight[:, None] * d_sum).to(d_slots_ptr.dtype.element_ty), mask=inside)
    tl.store(d_weights_ptr + token * FAN_OUT + slot, tl.sum(products, 1), mask=exists)


def forward(
    slots: Tensor,
    place: Tensor,
    weights: Tensor | None,
    addends: Sequence[Tensor] = (),
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum rows of `slots` `[R, C]` over each token's places `[S, F]`, but for negative ones: `[S, C]`.

    `weights` are `[S, F]` float32, the `addends`, three at most, `[S, C]`, `dtype` that of the slots unless given. Everything
    is contiguous, but for the places, which may be the first columns of more.
    """
    (num_tokens, fan_out), channels = place.shape, slots.shape[1]
    total = slots.new_empty(num_tokens, channels, dtype=dtype)
    if total.numel():
        block = block_of(channels, LAUNCH.channels)
        rows = LAUNCH.forward // block
        launch_kernel(
            _sum_kernel,
            cdiv(num_tokens, rows) * cdiv(channels, block),
            slots,
            place,
            weights,
            *addends,
            *(None,) * (MOST_ADDENDS - len(addends)),
            total,
            place.stride(0),
            num_tokens,
            CHANNELS=channels,
            BLOCK=block,
            ROWS=rows,
            FAN_OUT=fan_out,
            num_warps=LAUNCH.forward // (32 * LAUNCH.numbers_per_thread),
        )
    return total


def backward(d_sum: Tensor, slots: Tensor, place: Tensor, weights: Tensor) -> Gradients:
    """The gradients of the slots `[R, C]`, each of which has one place, and of the weights. Everything is contiguous."""
    (num_tokens, fan_out), channels = place.shape, slots.shape[1]
    d_slots, d_weights = slots.new_empty(slots.shape), weights.new_empty(weights.shape)
    if d_slots.numel() == 0:
        return Gradients(d_slots, d_weights.zero_())
    slots_block = 1 << (fan_out - 1).bit_length()
    columns = block_of(channels, max(LAUNCH.backward // slots_block, 16))
    launch_kernel(
        _backward_kernel,
        num_tokens,
        d_sum,
        slots,
        place,
        weights,
        d_slots,
        d_weights,
        CHANNELS=channels,
        COLUMNS=columns,
        FAN_OUT=fan_out,
        SLOTS_BLOCK=slots_block,
        num_warps=max(slots_block * columns // (32 * LAUNCH.numbers_per_thread), 1),
    )
    return Gradients(d_slots, d_weights)
