"""The short causal depthwise convolution along each ragged segment, its activation and an l2 norm of each head, in one pass.

    z_r = bias + sum_w weight[:, w] x_{r - W + 1 + w};  y = z or SiLU(z);  output = y or y / sqrt(sum over a head y^2 + eps)

x is read through an index where slots share a token's row. A program walks down a run of slots with a tile of channels and
keeps the last W - 1 inputs in registers: each is loaded and widened once, where W loads of shifted tiles would be most of the
work. Where a segment begins, and where the run does, the inputs before are loaded anew, from the carried state too. What a
border changes is made complete under its branch (how many slots are `left`, not where the segment ends): a number that is still
being loaded where branches meet makes every row wait for all loads that its scoreboard has, those ahead among them.

Backward z is made again on the same walk. dz_r goes into the sums of dx_{r - W + 1} to dx_r, of which the first is then
complete and is stored; the walk goes on for W - 1 slots past its run. The weight's gradient is summed along every run and then
over the runs: the same additions in the same order every time.

The taps of a walk are tuples. Triton joins tuples by + alone, and their types are nothing that a checker follows.
"""

# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels import slot_sum
from linear_moe.kernels.blocks import block_of, cdiv, sum_launch, summed_rows
from linear_moe.kernels.launch import launch_kernel

NORM_EPS = tl.constexpr(1e-6)
"""Inside the square root; the rules' l2 norm has the same."""
NEVER = tl.constexpr(1 << 62)
LOG2E = tl.constexpr(1.4426950408889634)
LARGEST_WIDTH = 8
LARGEST_HEAD = 256


class Launch(NamedTuple):
    """Launch parameters of a walk."""

    channels: int
    """Of a tile that no norm makes as wide as a head."""
    length: int
    """Slots of a run."""
    ahead: int
    """Rows that are on their way to shared memory before they are needed."""
    channels_per_warp: int
    """At W <= 4. More taps take the registers of half of them."""

    def num_warps(self, block: int, width: int) -> int:
        """Of a tile of `block` channels."""
        return max(1, block // (self.channels_per_warp if width <= 4 else self.channels_per_warp // 2))


class Copy(NamedTuple):
    """Launch parameters without a walk."""

    numbers: int
    """Of a tile, rows times channels."""
    channels: int
    num_warps: int


# From a frozen table, measured on an H100 (torch 2.11, triton 3.6, bf16; ms of k, v and of q through the index, at 98,304
# slots, C 1024, W 4, rows of k and v 4,224 bytes apart). Forward 0.157, 0.158, 0.139, a thread has 8 channels; runs of 32
# 0.158, 0.157, 0.155, of 128 longer; 1 row ahead 0.189, 0.182, 0.181, 5 as 2. Backward, with the sum of q's slots, 0.246,
# 0.248, 0.351; 2 rows ahead 0.263, 0.250, 0.373; then with a norm on two warps 0.321, 0.247, 0.406; runs of 64 0.311, 0.260,
# 0.413. With loads kept in registers forward 0.180, 0.188, 0.191, backward 0.341, 0.328, 0.437; with rows 4,112 bytes apart
# 0.198, 0.202, 0.191 and 0.377, 0.350, 0.437. The floors at 3 TB/s are 0.13 each forward, 0.20, 0.20 and 0.31 backward.
FORWARD = Launch(channels=256, length=64, ahead=2, channels_per_warp=256)
BACKWARD = Launch(channels=128, length=128, ahead=3, channels_per_warp=256)
INTERPRETED_WALKS = 64
COPY = Copy(numbers=2048, channels=256, num_warps=4)
"""Of what takes every row by itself."""


def walks_of(launch: Launch, num_slots: int, device: torch.device) -> tuple[int, int]:
    """Runs that a program walks at once, and their length."""
    if device.type == "cuda":
        # One: its borders are then borders for every thread.
        return 1, launch.length
    # The interpreter takes as long for a row of many runs as for one.
    return INTERPRETED_WALKS, cdiv(num_slots, INTERPRETED_WALKS)


@triton.jit
def _channels_of(program, CHANNELS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """The tile's channels, which of them there are, and the program's number among those of its tile (int64)."""
    NUM_TILES: tl.constexpr = (CHANNELS + TILE - 1) // TILE
    column = tl.arange(0, BLOCK)
    channels = (program % NUM_TILES) * TILE + column
    return channels, (column < TILE) & (channels < CHANNELS), (program // NUM_TILES).to(tl.int64)


@triton.jit
def _segment_of(segment_ptr, cu_seqlens_ptr, num_segments, rows, exists):
    """The segment of each row (int64), where it begins and ends. Rows past the last border are one that never ends."""
    segment = tl.load(segment_ptr + rows, mask=exists, other=num_segments).to(tl.int64)
    begin = tl.load(cu_seqlens_ptr + segment)
    end = tl.load(cu_seqlens_ptr + segment + 1, mask=segment < num_segments, other=NEVER)
    return segment, begin, end


@triton.jit
def _zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros((ROWS, BLOCK), tl.float32),)
    return zeros


@triton.jit
def _taps(weight_ptr, channels, in_channels, WIDTH: tl.constexpr):
    """The weights, a vector of channels for each tap."""
    taps = ()
    for tap in tl.static_range(WIDTH):
        weight = tl.load(weight_ptr + channels * WIDTH + tap, mask=in_channels, other=0.0)
        taps = taps + (weight.to(tl.float32)[None, :],)
    return taps


@triton.jit
def _load(x_ptr, x_stride, source_ptr, rows, valid, channels, in_channels):
    """X of each slot, as it is kept."""
    if source_ptr is not None:
        rows = tl.load(source_ptr + rows, mask=valid, other=0)
    at = rows[:, None] * x_stride + channels[None, :]
    return tl.load(x_ptr + at, mask=valid[:, None] & in_channels[None, :], other=0.0)


@triton.jit
def _window(x_ptr, x_stride, source_ptr, state_ptr, rows, segment, begin, num_segments, channels, in_channels,
            CHANNELS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The W - 1 inputs before each row, oldest first; 0 before a segment that carries none."""
    window = ()
    inside = segment < num_segments
    for tap in tl.static_range(WIDTH - 1):
        earlier = rows - (WIDTH - 1 - tap)
        own = inside & (earlier >= begin)
        x = _load(x_ptr, x_stride, source_ptr, earlier, own, channels, in_channels).to(tl.float32)
        if state_ptr is not None:
            at = ((segment + 1) * WIDTH + earlier - begin)[:, None] * CHANNELS + channels[None, :]
            mask = (inside & (earlier < begin))[:, None] & in_channels[None, :]
            # Rounded as the inputs are.
            x += tl.load(state_ptr + at, mask=mask, other=0.0).to(x_ptr.dtype.element_ty).to(tl.float32)
        window = window + (x,)
    return window


@triton.jit
def _convolved(window, x, taps, bias, WIDTH: tl.constexpr):
    """Z of each row."""
    z = bias + x * taps[WIDTH - 1]
    for tap in tl.static_range(WIDTH - 1):
        z += window[tap] * taps[tap]
    return z


@triton.jit
def _bias(bias_ptr, channels, in_channels):
    if bias_ptr is None:
        bias = tl.zeros((channels.shape[0],), tl.float32)
    else:
        bias = tl.load(bias_ptr + channels, mask=in_channels, other=0.0).to(tl.float32)
    return bias[None, :]


@triton.jit
def _sigmoid(z, EXACT: tl.constexpr):
    """Of z in float32, exact to its last bits or, in half the instructions, to what 16 bits keep.

    The exponent is kept where nothing overflows; what that changes is nothing in float32.
    """
    if EXACT:
        return 1.0 / (1.0 + tl.exp(tl.minimum(-z, 80.0)))
    else:
        root = tl.rsqrt(1.0 + tl.exp2(tl.minimum(z * -LOG2E, 126.0)))
        return root * root


@triton.jit
def _over_heads(x, HEAD: tl.constexpr):
    """The sum over each head's channels, at each of them."""
    by_head = tl.reshape(x, (x.shape[0] * x.shape[1] // HEAD, HEAD))
    total = tl.sum(by_head, 1)[:, None] + tl.zeros(by_head.shape, tl.float32)
    return tl.reshape(total, x.shape)


@triton.jit
def _both_over_heads(x, y, HEAD: tl.constexpr):
    """`_over_heads` of two at once: warps meet but once."""
    HEADS: tl.constexpr = x.shape[0] * x.shape[1] // HEAD
    by_head = tl.join(tl.reshape(x, (HEADS, HEAD)), tl.reshape(y, (HEADS, HEAD)))
    of_x, of_y = tl.split(tl.sum(by_head, 1))
    zeros = tl.zeros((HEADS, HEAD), tl.float32)
    return tl.reshape(of_x[:, None] + zeros, x.shape), tl.reshape(of_y[:, None] + zeros, x.shape)


@triton.jit
def _gradient(d, z, SILU: tl.constexpr, HEAD: tl.constexpr, EXACT: tl.constexpr):
    """The loss's gradient by z, from that by the output. 0 where that is 0 along a head."""
    y = z
    slope = 1.0
    if SILU:
        sigmoid = _sigmoid(z, EXACT)
        y = z * sigmoid
        slope = sigmoid * (1.0 + z * (1.0 - sigmoid))
    if HEAD > 0:
        of_squares, of_products = _both_over_heads(y * y, d * y, HEAD)
        shrink = tl.rsqrt(of_squares + NORM_EPS)
        d = shrink * (d - y * (of_products * shrink * shrink))
    return d * slope


@triton.jit
def _forward_kernel(
    x_ptr,
    source_ptr,
    state_ptr,
    weight_ptr,
    bias_ptr,
    segment_ptr,
    cu_seqlens_ptr,
    output_ptr,
    x_stride,
    num_slots,
    num_segments,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    WALKS: tl.constexpr,
    LENGTH: tl.constexpr,
    AHEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    HEAD: tl.constexpr,
):
    channels, in_channels, run = _channels_of(tl.program_id(0), CHANNELS, TILE, BLOCK)
    taps = _taps(weight_ptr, channels, in_channels, WIDTH)
    bias = _bias(bias_ptr, channels, in_channels)
    rows = (run * WALKS + tl.arange(0, WALKS)) * LENGTH
    border = tl.load(cu_seqlens_ptr + num_segments)
    # Nothing is known yet: the first step looks for its segment as one at a border does.
    left = rows - rows
    window = _zeros(WIDTH - 1, WALKS, BLOCK)
    for _ in tl.range(LENGTH, num_stages=AHEAD + 1):
        x = _load(x_ptr, x_stride, source_ptr, rows, rows < border, channels, in_channels).to(tl.float32)
        exists = rows < num_slots
        if tl.min(left, 0) <= 0:
            segment, begin, end = _segment_of(segment_ptr, cu_seqlens_ptr, num_segments, rows, exists)
            left = end - rows
            window = _window(
                x_ptr, x_stride, source_ptr, state_ptr, rows, segment, begin, num_segments, channels, in_channels,
                CHANNELS, WIDTH,
            )  # fmt: skip
        y = _convolved(window, x, taps, bias, WIDTH)
        if SILU:
            y *= _sigmoid(y, x_ptr.dtype.element_ty == tl.float32)
        if HEAD > 0:
            y *= tl.rsqrt(_over_heads(y * y, HEAD) + NORM_EPS)
        if bias_ptr is not None:
            y = tl.where((rows < border)[:, None], y, 0.0)
        at = output_ptr + rows[:, None] * CHANNELS + channels[None, :]
        tl.store(at, y.to(output_ptr.dtype.element_ty), mask=exists[:, None] & in_channels[None, :])
        if WIDTH > 1:
            window = window[1:] + (x,)
        rows += 1
        left -= 1


@triton.jit
def _store_gradient(d_x_ptr, d_x_stride, d_carried_ptr, d_x, rows, stored, segment, end, num_segments, channels, in_channels,
                    CHANNELS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Dx of rows that have it all but what comes through the new state."""
    if d_carried_ptr is not None:
        kept = stored & (segment < num_segments) & (rows >= end - WIDTH)
        at = ((segment + 1) * WIDTH + rows - end)[:, None] * CHANNELS + channels[None, :]
        d_x += tl.load(d_carried_ptr + at, mask=kept[:, None] & in_channels[None, :], other=0.0).to(tl.float32)
    at = d_x_ptr + rows[:, None] * d_x_stride + channels[None, :]
    tl.store(at, d_x.to(d_x_ptr.dtype.element_ty), mask=stored[:, None] & in_channels[None, :])


@triton.jit
def _backward_kernel(
    d_output_ptr,
    d_carried_ptr,
    x_ptr,
    source_ptr,
    state_ptr,
    weight_ptr,
    bias_ptr,
    segment_ptr,
    cu_seqlens_ptr,
    d_x_ptr,
    sums_ptr,
    x_stride,
    d_x_stride,
    num_slots,
    num_segments,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    WALKS: tl.constexpr,
    LENGTH: tl.constexpr,
    AHEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    HEAD: tl.constexpr,
    SUM_CHANNELS: tl.constexpr,
):
    LATE: tl.constexpr = WIDTH - 1
    NUM_SUMS: tl.constexpr = WIDTH if bias_ptr is None else WIDTH + 1
    channels, in_channels, run = _channels_of(tl.program_id(0), CHANNELS, TILE, BLOCK)
    taps = _taps(weight_ptr, channels, in_channels, WIDTH)
    bias = _bias(bias_ptr, channels, in_channels)
    runs = run * WALKS + tl.arange(0, WALKS)
    first = runs * LENGTH
    past = tl.minimum(first + LENGTH, num_slots)
    border = tl.load(cu_seqlens_ptr + num_segments)
    rows = first
    segment, end, left, lowest = rows, rows, rows - rows, first
    # Of the W - 1 rows before this one, oldest first: the inputs, and their gradients so far.
    window = _zeros(LATE, WALKS, BLOCK)
    d_window = _zeros(LATE, WALKS, BLOCK)
    sums = _zeros(NUM_SUMS, WALKS, BLOCK)
    for step in tl.range(LENGTH + LATE, num_stages=AHEAD + 1):
        valid = rows < border
        x = _load(x_ptr, x_stride, source_ptr, rows, valid, channels, in_channels).to(tl.float32)
        d = _load(d_output_ptr, CHANNELS, None, rows, valid, channels, in_channels).to(tl.float32)
        if tl.min(left, 0) <= 0:
            if d_x_ptr is not None:
                # No later row adds to the last ones of the segment before. What is left in the window of theirs is not stored.
                for tap in tl.static_range(LATE):
                    earlier = rows - (LATE - tap)
                    stored = (left <= 0) & (earlier >= lowest) & (earlier < past)
                    _store_gradient(
                        d_x_ptr, d_x_stride, d_carried_ptr, d_window[tap], earlier, stored, segment, end, num_segments,
                        channels, in_channels, CHANNELS, WIDTH,
                    )  # fmt: skip
            segment, begin, end = _segment_of(segment_ptr, cu_seqlens_ptr, num_segments, rows, rows < num_slots)
            window = _window(
                x_ptr, x_stride, source_ptr, state_ptr, rows, segment, begin, num_segments, channels, in_channels,
                CHANNELS, WIDTH,
            )  # fmt: skip
            left, lowest = end - rows, tl.maximum(begin, first)
        d = _gradient(d, _convolved(window, x, taps, bias, WIDTH), SILU, HEAD, x_ptr.dtype.element_ty == tl.float32)
        if step < LENGTH:
            added = ()
            for tap in tl.static_range(LATE):
                added = added + (sums[tap] + d * window[tap],)
            added = added + (sums[LATE] + d * x,)
            if bias_ptr is not None:
                added = added + (sums[WIDTH] + d,)
            sums = added
        if d_x_ptr is not None:
            d_now = ()
            for tap in tl.static_range(LATE):
                d_now = d_now + (d_window[tap] + d * taps[tap],)
            d_now = d_now + (d * taps[LATE],)
            earlier = rows - LATE
            stored = (earlier >= lowest) & (earlier < past)
            _store_gradient(
                d_x_ptr, d_x_stride, d_carried_ptr, d_now[0], earlier, stored, segment, end, num_segments, channels,
                in_channels, CHANNELS, WIDTH,
            )  # fmt: skip
            d_window = d_now[1:]
        if WIDTH > 1:
            window = window[1:] + (x,)
        rows += 1
        left -= 1
    exists = (first < num_slots)[:, None] & in_channels[None, :]
    for tap in tl.static_range(NUM_SUMS):
        at = sums_ptr + (runs * NUM_SUMS + tap)[:, None] * SUM_CHANNELS + channels[None, :]
        tl.store(at, sums[tap], mask=exists)


@triton.jit
def _sum_runs_kernel(
    sums_ptr, d_weight_ptr, d_bias_ptr, num_runs, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    NUM_SUMS: tl.constexpr = WIDTH if d_bias_ptr is None else WIDTH + 1
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = summed_rows(sums_ptr, num_runs, column, NUM_SUMS * CHANNELS, ROWS)
    tap, channel = column // CHANNELS, column % CHANNELS
    tl.store(d_weight_ptr + channel * WIDTH + tap, total.to(d_weight_ptr.dtype.element_ty), mask=tap < WIDTH)
    if d_bias_ptr is not None:
        tl.store(d_bias_ptr + channel, total.to(d_bias_ptr.dtype.element_ty), mask=tap == WIDTH)


class Conv(NamedTuple):
    """What a call convolves, and how. All but `x` contiguous; `x` along its channels."""

    x: Tensor
    """`[S, C]`"""
    weight: Tensor
    """`[C, W]`"""
    bias: Tensor | None
    """`[C]`"""
    cu_seqlens: Tensor
    """`[N + 1]` int64"""
    segment: Tensor
    """`[R]` int32 the segment of each slot, N in none."""
    source: Tensor | None
    """`[R]` int64 the row of x that a slot reads; None: its own."""
    state: Tensor | None
    """`[N, W, C]`"""
    silu: bool
    head: int | None
    """Channels that a norm takes together."""

    @property
    def num_slots(self) -> int:
        """R"""
        return self.segment.numel()

    @property
    def num_segments(self) -> int:
        """N"""
        return self.cu_seqlens.numel() - 1

    @property
    def channels(self) -> int:
        """C"""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """W"""
        return self.weight.shape[1]

    def tile(self, channels: int) -> tuple[int, int, int]:
        """Channels of a tile, the power of two that holds them, and how many of that are a head; 0 without a norm."""
        if self.head is None:
            tile = min(self.channels, channels)
            return tile, block_of(tile), 0
        if self.head & (self.head - 1):
            return self.head, block_of(self.head), block_of(self.head)
        tile = min(self.channels, max(self.head, channels))
        return tile, block_of(tile), self.head


def forward(conv: Conv) -> Tensor:
    """The output `[R, C]` in the dtype of x."""
    output = conv.x.new_empty(conv.num_slots, conv.channels)
    tile, block, head = conv.tile(FORWARD.channels)
    walks, length = walks_of(FORWARD, conv.num_slots, conv.x.device)
    if conv.num_slots:
        launch_kernel(
            _forward_kernel,
            cdiv(conv.num_slots, walks * length) * cdiv(conv.channels, tile),
            conv.x,
            conv.source,
            conv.state,
            conv.weight,
            conv.bias,
            conv.segment,
            conv.cu_seqlens,
            output,
            conv.x.stride(0),
            conv.num_slots,
            conv.num_segments,
            CHANNELS=conv.channels,
            TILE=tile,
            BLOCK=block,
            WALKS=walks,
            LENGTH=length,
            AHEAD=FORWARD.ahead,
            WIDTH=conv.width,
            SILU=conv.silu,
            HEAD=head,
            num_warps=FORWARD.num_warps(block, conv.width),
        )
    return output


def new_sums(num_slots: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Room for what every run makes of the gradients of a weight and a bias, `[runs, W or W + 1, C]` float32."""
    _, length = walks_of(BACKWARD, num_slots, weight.device)
    runs = cdiv(num_slots, length) if num_slots else 0
    return weight.new_empty(runs, weight.shape[1] + (bias is not None), weight.shape[0], dtype=torch.float32)


def backward(
    conv: Conv,
    d_output: Tensor,
    d_carried: Tensor | None,
    place: Tensor | None,
    sums: Tensor,
    *,
    want_x: bool,
    d_x: Tensor | None = None,
) -> Tensor | None:
    """The gradient of x `[S, C]`, if wanted; those of the weight and the bias are what `sum_runs` makes of `sums`.

    `place` `[S, F]` are the slots that read a row of x through `source`, negative where there are fewer. `sums` are this
    convolution's channels of what `new_sums` makes. `d_x` `[S, C]`, which may be a range of columns, is written instead of a
    new tensor; without a source only.
    """
    tile, block, head = conv.tile(BACKWARD.channels)
    walks, length = walks_of(BACKWARD, conv.num_slots, conv.x.device)
    runs = sums.shape[0]
    d_slots = conv.x.new_empty(conv.num_slots, conv.channels) if want_x and d_x is None else d_x
    if runs:
        launch_kernel(
            _backward_kernel,
            cdiv(runs, walks) * cdiv(conv.channels, tile),
            d_output,
            d_carried,
            conv.x,
            conv.source,
            conv.state,
            conv.weight,
            conv.bias,
            conv.segment,
            conv.cu_seqlens,
            d_slots,
            sums,
            conv.x.stride(0),
            0 if d_slots is None else d_slots.stride(0),
            conv.num_slots,
            conv.num_segments,
            CHANNELS=conv.channels,
            TILE=tile,
            BLOCK=block,
            WALKS=walks,
            LENGTH=length,
            AHEAD=BACKWARD.ahead,
            WIDTH=conv.width,
            SILU=conv.silu,
            HEAD=head,
            SUM_CHANNELS=sums.stride(1),
            num_warps=BACKWARD.num_warps(block, conv.width),
        )
    return d_slots if d_slots is None or conv.source is None else _sum_of_readers(d_slots, place)


def sum_runs(sums: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradients of the weight and the bias."""
    d_weight = torch.empty_like(weight)
    d_bias = None if bias is None else torch.empty_like(bias)
    numbers = sums.shape[1] * sums.shape[2]
    rows, columns, num_warps = sum_launch(sums)
    launch_kernel(
        _sum_runs_kernel, cdiv(numbers, columns), sums, d_weight, d_bias, sums.shape[0], CHANNELS=weight.shape[0],
        WIDTH=weight.shape[1], ROWS=rows, COLUMNS=columns, num_warps=num_warps,
    )  # fmt: skip
    return d_weight, d_bias


def _sum_of_readers(d_slots: Tensor, place: Tensor | None) -> Tensor:
    """The gradient of what was read through a source: each row's sum over the slots that read it."""
    assert place is not None
    return slot_sum.forward(d_slots, place, None)
