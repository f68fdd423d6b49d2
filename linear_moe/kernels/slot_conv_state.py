"""What the short convolution carries from call to call: the last W inputs of each segment, and their gradient."""

# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import block_of, cdiv
from linear_moe.kernels.launch import launch_kernel
from linear_moe.kernels.slot_conv import (
    COPY,
    Conv,
    Copy,
    _bias,
    _channels_of,
    _convolved,
    _gradient,
    _load,
    _taps,
    _window,
    _zeros,
)

# A thread has 8 channels. With 16 a W of 4 takes 200 registers; a W of 8, which is rare, spills with either.
STATE_GRADIENT = Copy(numbers=1024, channels=256, num_warps=4)


@triton.jit
def _carry_kernel(
    x_ptr, source_ptr, state_ptr, cu_seqlens_ptr, carried_ptr, x_stride, num_segments, CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The last W inputs of each segment, of those before it too: of an empty one those alone, bit for bit."""
    channels, in_channels, run = _channels_of(tl.program_id(0), CHANNELS, BLOCK, BLOCK)
    rows = run * ROWS + tl.arange(0, ROWS)
    segment = rows // WIDTH
    exists = segment < num_segments
    begin = tl.load(cu_seqlens_ptr + segment, mask=exists, other=0)
    length = tl.load(cu_seqlens_ptr + segment + 1, mask=exists, other=0) - begin
    place = length - WIDTH + rows % WIDTH
    own = exists & (place >= 0)
    at = begin + place
    if source_ptr is not None:
        at = tl.load(source_ptr + at, mask=own, other=0)
    at = at[:, None] * x_stride + channels[None, :]
    value = tl.load(x_ptr + at, mask=own[:, None] & in_channels[None, :], other=0.0).to(tl.float32)
    if state_ptr is not None:
        at = ((segment + 1) * WIDTH + place)[:, None] * CHANNELS + channels[None, :]
        old = (exists & (place < 0))[:, None] & in_channels[None, :]
        state = tl.load(state_ptr + at, mask=old, other=0.0).to(tl.float32)
        value = tl.where(
            old, tl.where((length > 0)[:, None], state.to(x_ptr.dtype.element_ty).to(tl.float32), state), value
        )
    at = carried_ptr + rows[:, None] * CHANNELS + channels[None, :]
    tl.store(at, value.to(carried_ptr.dtype.element_ty), mask=exists[:, None] & in_channels[None, :])


@triton.jit
def _state_gradient_kernel(
    d_output_ptr, d_carried_ptr, x_ptr, source_ptr, state_ptr, weight_ptr, bias_ptr, cu_seqlens_ptr, d_state_ptr,
    x_stride, num_segments, CHANNELS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """A segment a row: what its first W - 1 slots ask of the inputs before it, and what of them is carried on."""
    channels, in_channels, run = _channels_of(tl.program_id(0), CHANNELS, TILE, BLOCK)
    taps = _taps(weight_ptr, channels, in_channels, WIDTH)
    bias = _bias(bias_ptr, channels, in_channels)
    segment = run * ROWS + tl.arange(0, ROWS)
    exists = segment < num_segments
    begin = tl.load(cu_seqlens_ptr + segment, mask=exists, other=0)
    length = tl.load(cu_seqlens_ptr + segment + 1, mask=exists, other=0) - begin
    gradients = _zeros(WIDTH, ROWS, BLOCK)
    for place in tl.static_range(WIDTH - 1):
        rows = begin + place
        valid = place < length
        window = _window(
            x_ptr, x_stride, source_ptr, state_ptr, rows, tl.where(valid, segment, num_segments), begin, num_segments,
            channels, in_channels, CHANNELS, WIDTH,
        )  # fmt: skip
        x = _load(x_ptr, x_stride, source_ptr, rows, valid, channels, in_channels).to(tl.float32)
        d = _load(d_output_ptr, CHANNELS, None, rows, valid, channels, in_channels).to(tl.float32)
        d = _gradient(d, _convolved(window, x, taps, bias, WIDTH), SILU, HEAD, x_ptr.dtype.element_ty == tl.float32)
        added = ()
        for row in tl.static_range(WIDTH):
            if row > place:
                added = added + (gradients[row] + d * taps[row - place - 1],)
            else:
                added = added + (gradients[row],)
        gradients = added
    for row in tl.static_range(WIDTH):
        at = (segment * WIDTH + row)[:, None] * CHANNELS + channels[None, :]
        mask = exists[:, None] & in_channels[None, :]
        total = gradients[row]
        if d_carried_ptr is not None:
            kept = (row >= length)[:, None] & mask
            total += tl.load(d_carried_ptr + at - length[:, None] * CHANNELS, mask=kept, other=0.0).to(tl.float32)
        tl.store(d_state_ptr + at, total.to(d_state_ptr.dtype.element_ty), mask=mask)


def carry(conv: Conv) -> Tensor:
    """The new state `[N, W, C]` in the dtype of the old one, or of x without one."""
    dtype = conv.x.dtype if conv.state is None else conv.state.dtype
    carried = conv.x.new_empty(conv.num_segments, conv.width, conv.channels, dtype=dtype)
    block = block_of(conv.channels, COPY.channels)
    rows = COPY.numbers // block
    launch_kernel(
        _carry_kernel,
        cdiv(conv.num_segments * conv.width, rows) * cdiv(conv.channels, block),
        conv.x,
        conv.source,
        conv.state,
        conv.cu_seqlens,
        carried,
        conv.x.stride(0),
        conv.num_segments,
        CHANNELS=conv.channels,
        BLOCK=block,
        ROWS=rows,
        WIDTH=conv.width,
        num_warps=COPY.num_warps,
    )
    return carried


def state_gradient(conv: Conv, d_output: Tensor, d_carried: Tensor | None) -> Tensor:
    """The old state's gradient `[N, W, C]` in its dtype."""
    assert conv.state is not None
    d_state = torch.empty_like(conv.state)
    tile, block, head = conv.tile(STATE_GRADIENT.channels)
    rows = STATE_GRADIENT.numbers // block
    launch_kernel(
        _state_gradient_kernel,
        cdiv(conv.num_segments, rows) * cdiv(conv.channels, tile),
        d_output,
        d_carried,
        conv.x,
        conv.source,
        conv.state,
        conv.weight,
        conv.bias,
        conv.cu_seqlens,
        d_state,
        conv.x.stride(0),
        conv.num_segments,
        CHANNELS=conv.channels,
        TILE=tile,
        BLOCK=block,
        ROWS=rows,
        WIDTH=conv.width,
        SILU=conv.silu,
        HEAD=head,
        num_warps=STATE_GRADIENT.num_warps,
    )
    return d_state
