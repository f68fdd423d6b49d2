"""From the projections of one decoded token to what its memories' recurrence takes, and the convolution's inputs carried on.

    z_r = bias + sum_w weight[:, w] x_{r - W + 1 + w};  y = z or SiLU(z);  output = y or y / sqrt(sum over a head y^2 + eps)
    log_decay = -exp(rate) softplus(x + shift)          beta = largest sigmoid(x)

Every projection of every slot in one launch, whichever of these it goes through. x_r is the token's, the ones before it are the
last W inputs of the slot's memory, which are shifted by one in place. In float32, rounded once.

The taps are tuples. Triton joins tuples by + alone, and their types are nothing that a checker follows.
"""

# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import block_of, cdiv
from linear_moe.kernels.gates import softplus
from linear_moe.kernels.launch import launch_kernel
from linear_moe.kernels.operator import operator

NORM_EPS = tl.constexpr(1e-6)
"""Inside the square root; the rules' l2 norm has the same."""
LARGEST_WIDTH = 8
LARGEST_HEAD = 256
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Launch(NamedTuple):
    """Launch parameters."""

    channels: int
    """Of a program's tile, but where a norm makes it as wide as a head."""
    channels_per_warp: int


# Measured on an H200 (benchmarks/results/decode_tokens.csv), us of 64 sequences: channels that are convolved or normed took 5.7
# with two a thread, 6.2 with four and 8.6 with eight. Where all are copied, tiles of 256 channels with four a thread took 3.1,
# of 1,024 with eight 3.0; of 256 sequences 7.7 and 4.9.
MADE = Launch(channels=256, channels_per_warp=64)
COPIED = Launch(channels=1024, channels_per_warp=256)


class Part(NamedTuple):
    """One projection: where it stands, and what becomes of it."""

    by_token: bool
    """Whether it is made once a token rather than once a slot."""
    column: int
    """The first of its columns."""
    width: int
    channel: int = -1
    """The first of its channels in the convolution, or -1 without one."""
    silu: bool = False
    head: int = 0
    """Channels of a head that an l2 norm follows on, or 0."""


class Gate(NamedTuple):
    """A gate's projection, a number a head."""

    by_token: bool
    column: int


class Made(NamedTuple):
    """What `make_tokens` makes."""

    parts: tuple[Tensor, ...]
    """`[R, width]` of each part, contiguous."""
    rows: Tensor
    """`[R]` int64: the row b * M + m of each slot's memory in a layer's state, -1 of a pad."""
    log_decay: Tensor | None
    """`[R, H]` float32"""
    beta: Tensor | None
    """`[R, H]` float32"""


class Conv(NamedTuple):
    """A layer's convolution along the memories."""

    state: Tensor
    """`[B, M, W, C]`: the last W inputs of each memory. Updated in place."""
    weight: Tensor
    """`[C, W]`, the last column on the token itself."""
    bias: Tensor | None
    """`[C]`"""


class Gates(NamedTuple):
    """Which gates are made."""

    num_heads: int
    decay: Gate | None = None
    rate: Tensor | None = None
    """`[H]`, with a decay."""
    shift: Tensor | None = None
    """`[H]`, with a decay."""
    strength: Gate | None = None
    largest: float = 1.0
    """Of a strength."""


@triton.jit
def _sigmoid(z):
    """The exponent is kept where it can't overflow; what that changes is nothing in float32."""
    return 1.0 / (1.0 + tl.exp(tl.minimum(-z, 80.0)))


@triton.jit
def _columns(
    memory_ptr, token_ptr, slot, token, column, inside, BY_TOKEN: tl.constexpr, MEMORY_COLUMNS: tl.constexpr,
    TOKEN_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Columns of a projection that is made once a slot, or once a token."""
    if BY_TOKEN:
        at = token_ptr + token * TOKEN_COLUMNS + column
    else:
        at = memory_ptr + slot * MEMORY_COLUMNS + column
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _convolved(
    z, state_ptr, weight_ptr, bias_ptr, row, channel, inside, DTYPE: tl.constexpr, CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """What the convolution makes of z, which moves into the row of inputs that are carried. A pad's row, -1, is left alone."""
    carried = (tl.zeros(inside.shape, tl.int64) + row >= 0) & inside
    state_at = state_ptr + row * (WIDTH * CHANNELS) + channel
    taps = ()
    for tap in tl.static_range(1, WIDTH):
        # Rounded as the inputs are.
        taps = taps + (tl.load(state_at + tap * CHANNELS, mask=carried, other=0.0).to(DTYPE).to(tl.float32),)
    taps = taps + (z,)
    # All are read before any is written: what a thread writes another may have to read, if their layouts differ.
    tl.debug_barrier()
    total = tl.zeros(inside.shape, tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    for tap in tl.static_range(WIDTH):
        total += taps[tap] * tl.load(weight_ptr + channel * WIDTH + tap, mask=inside, other=0.0).to(tl.float32)
        tl.store(state_at + tap * CHANNELS, taps[tap].to(state_ptr.dtype.element_ty), mask=carried)
    return total


@triton.jit
def _make_part(
    memory_columns_ptr, token_columns_ptr, state_ptr, weight_ptr, bias_ptr, parts_ptr, slot, token, row, tile, num_slots,
    MEMORY_COLUMNS: tl.constexpr, TOKEN_COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    START: tl.constexpr, BY_TOKEN: tl.constexpr, COLUMN: tl.constexpr, PART_WIDTH: tl.constexpr, CHANNEL: tl.constexpr,
    SILU: tl.constexpr, HEAD: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of one part of a slot."""
    lane = tl.arange(0, BLOCK)
    place = tile * TILE + lane
    inside = (lane < TILE) & (place < PART_WIDTH)
    y = _columns(
        memory_columns_ptr, token_columns_ptr, slot, token, COLUMN + place, inside, BY_TOKEN, MEMORY_COLUMNS, TOKEN_COLUMNS
    )  # fmt: skip
    if CHANNEL >= 0:
        y = _convolved(
            y, state_ptr, weight_ptr, bias_ptr, row, CHANNEL + place, inside, parts_ptr.dtype.element_ty, CHANNELS, WIDTH
        )  # fmt: skip
    if SILU:
        y *= _sigmoid(y)
    if HEAD > 0:
        y *= tl.rsqrt(tl.sum(tl.where(inside, y * y, 0.0), 0) + NORM_EPS)
    out_ptr = parts_ptr + tl.full((), START, tl.int64) * num_slots + slot * PART_WIDTH
    tl.store(out_ptr + place, y.to(parts_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _make_gates(
    memory_columns_ptr, token_columns_ptr, rate_ptr, shift_ptr, log_decay_ptr, beta_ptr, slot, token, largest,
    MEMORY_COLUMNS: tl.constexpr, TOKEN_COLUMNS: tl.constexpr, HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr,
    DECAY: tl.constexpr, STRENGTH: tl.constexpr,
):  # fmt: skip
    """The gates of a slot's heads."""
    head = tl.arange(0, HEADS_BLOCK)
    inside = head < HEADS
    if DECAY is not None:
        x = _columns(
            memory_columns_ptr, token_columns_ptr, slot, token, DECAY[1] + head, inside, DECAY[0], MEMORY_COLUMNS,
            TOKEN_COLUMNS,
        )  # fmt: skip
        rate = tl.load(rate_ptr + head, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + head, mask=inside, other=0.0).to(tl.float32)
        tl.store(log_decay_ptr + slot * HEADS + head, -tl.exp(rate) * softplus(x + shift), mask=inside)
    if STRENGTH is not None:
        x = _columns(
            memory_columns_ptr, token_columns_ptr, slot, token, STRENGTH[1] + head, inside, STRENGTH[0], MEMORY_COLUMNS,
            TOKEN_COLUMNS,
        )  # fmt: skip
        tl.store(beta_ptr + slot * HEADS + head, largest * _sigmoid(x), mask=inside)


@triton.jit
def _tokens_kernel(
    memory_columns_ptr, token_columns_ptr, memory_ptr, valid_ptr, state_ptr, weight_ptr, bias_ptr, rate_ptr, shift_ptr,
    parts_ptr, log_decay_ptr, beta_ptr, rows_ptr, num_slots, largest, STATES: tl.constexpr, FAN_OUT: tl.constexpr,
    MEMORY_COLUMNS: tl.constexpr, TOKEN_COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr, NUM_PARTS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, DECAY: tl.constexpr, STRENGTH: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % (TILES + GATES)
    slot = (tl.program_id(0) // (TILES + GATES)).to(tl.int64)
    token = slot // FAN_OUT
    row = token * STATES
    if memory_ptr is not None:
        row += tl.load(memory_ptr + slot)
    if valid_ptr is not None:
        row = tl.where(tl.load(valid_ptr + token) != 0, row, -1)
    if tile == 0:
        tl.store(rows_ptr + slot, row)
    for part in tl.static_range(NUM_PARTS):
        if (tile >= PARTS[part][0]) & (tile < PARTS[part][1]):
            _make_part(
                memory_columns_ptr, token_columns_ptr, state_ptr, weight_ptr, bias_ptr, parts_ptr, slot, token, row,
                tile - PARTS[part][0], num_slots, MEMORY_COLUMNS, TOKEN_COLUMNS, CHANNELS, WIDTH, PARTS[part][2],
                PARTS[part][3], PARTS[part][4], PARTS[part][5], PARTS[part][6], PARTS[part][7], PARTS[part][8],
                PARTS[part][9], BLOCK,
            )  # fmt: skip
    if GATES > 0:
        if tile == TILES:
            _make_gates(
                memory_columns_ptr, token_columns_ptr, rate_ptr, shift_ptr, log_decay_ptr, beta_ptr, slot, token, largest,
                MEMORY_COLUMNS, TOKEN_COLUMNS, HEADS, HEADS_BLOCK, DECAY, STRENGTH,
            )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _tiling(parts: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], ...], int, int, int]:
    """Of the parts' fields, one after another: a row for each part, the tiles of a slot, the channels of a tile at most, and
    its warps.

    A row is the part's first tile and the one behind its last, where its output starts (in numbers a slot), the fields, and
    the channels of its tiles: a norm needs its head in one.
    """
    each = [Part(bool(by_token), *rest) for by_token, *rest in zip(*[iter(parts)] * len(Part._fields), strict=True)]
    launch = COPIED if all(part.channel < 0 and not part.head for part in each) else MADE
    block = block_of(max(part.head or min(part.width, launch.channels) for part in each))
    table, first, start = [], 0, 0
    for part in each:
        tile = part.head or block
        last = first + cdiv(part.width, tile)
        table.append((first, last, start, *(int(field) for field in part), tile))
        first, start = last, start + part.width
    return tuple(table), first, block, max(1, block // launch.channels_per_warp)


def _flat(parts: Sequence[Part]) -> list[int]:
    return [int(field) for part in parts for field in part]


def _flat_gate(gate: Gate | None) -> list[int]:
    return [] if gate is None else [int(gate.by_token), gate.column]


def _room(
    columns: Tensor, slots: int, width: int, decay: list[int], strength: list[int], heads: int
) -> tuple[Tensor, ...]:
    """The results' tensors, an empty one where nothing is made. The parts are ranges of one."""
    return (
        columns.new_empty(slots * width),
        columns.new_empty(slots, dtype=torch.int64),
        columns.new_empty(slots if decay else 0, heads, dtype=torch.float32),
        columns.new_empty(slots if strength else 0, heads, dtype=torch.float32),
    )


def _num_slots(memory_columns: Tensor | None, token_columns: Tensor | None, memory: Tensor | None) -> int:
    if memory is not None:
        return memory.numel()
    columns = token_columns if memory_columns is None else memory_columns
    assert columns is not None
    return columns.shape[0]


@operator("decode_tokens", mutates=("state",))
def _make_tokens(
    memory_columns: Tensor | None, token_columns: Tensor | None, memory: Tensor | None, valid: Tensor | None,
    state: Tensor | None, weight: Tensor | None, bias: Tensor | None, rate: Tensor | None, shift: Tensor | None,
    num_states: int, parts: list[int], decay: list[int], strength: list[int], heads: int, largest: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    columns = token_columns if memory_columns is None else memory_columns
    assert columns is not None
    num_slots = _num_slots(memory_columns, token_columns, memory)
    made = _room(columns, num_slots, sum(parts[2 :: len(Part._fields)]), decay, strength, heads)
    if num_slots:
        table, tiles, block, num_warps = _tiling(tuple(parts))
        gates = int(bool(decay or strength))
        flat, rows, log_decay, beta = made
        with torch.cuda.device_of(columns):
            launch_kernel(
                _tokens_kernel,
                num_slots * (tiles + gates),
                memory_columns,
                token_columns,
                memory,
                None if valid is None else valid.view(torch.uint8),
                state,
                weight,
                bias,
                rate,
                shift,
                flat,
                log_decay,
                beta,
                rows,
                num_slots,
                largest,
                STATES=num_states,
                FAN_OUT=1 if memory is None else memory.shape[1],
                MEMORY_COLUMNS=0 if memory_columns is None else memory_columns.shape[1],
                TOKEN_COLUMNS=0 if token_columns is None else token_columns.shape[1],
                CHANNELS=0 if weight is None else weight.shape[0],
                WIDTH=1 if weight is None else weight.shape[1],
                PARTS=table,
                NUM_PARTS=len(table),
                TILES=tiles,
                BLOCK=block,
                HEADS=heads,
                HEADS_BLOCK=1 << max(heads - 1, 0).bit_length(),
                DECAY=tuple(decay) or None,
                STRENGTH=tuple(strength) or None,
                GATES=gates,
                num_warps=num_warps,
            )
    return made  # type: ignore[return-value]


@torch.library.register_fake("linear_moe::decode_tokens")
def _(memory_columns, token_columns, memory, valid, state, weight, bias, rate, shift, num_states, parts, decay, strength,
      heads, largest):  # fmt: skip
    columns = token_columns if memory_columns is None else memory_columns
    num_slots = _num_slots(memory_columns, token_columns, memory)
    return _room(columns, num_slots, sum(parts[2 :: len(Part._fields)]), decay, strength, heads)


def make_tokens(
    memory_columns: Tensor | None,
    token_columns: Tensor | None,
    parts: Sequence[Part],
    *,
    num_states: int,
    memory: Tensor | None = None,
    valid: Tensor | None = None,
    conv: Conv | None = None,
    gates: Gates | None = None,
) -> Made:
    """The parts and gates of the R = S * F slots of S tokens, one of each sequence; slot f of token s is s * F + f.

    Without gradients. Nothing waits for the device, so the values of `memory` are not checked.

    Args:
        memory_columns: `[R, *]` float32, bfloat16 or float16: projections made once a slot, side by side; or None.
        token_columns: `[S, *]` in the same dtype: those made once a token; or None.
        parts: what becomes of which columns.
        num_states: M, memories of a sequence.
        memory: `[S, F]` int64, below M: the memories of each token, each once. None: F and M are 1.
        valid: `[S]` bool: a pad's slots have row -1 and change no convolution's inputs; what its parts are means nothing.
            None for all.
        conv: the convolution that the parts with a channel go through, of at most 8 taps.
        gates: which gates are made.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check(memory_columns, token_columns, parts, num_states, memory, valid, conv, gates)
    given = gates or Gates(0)
    tensors = (memory_columns, token_columns, memory, valid)
    flat, rows, log_decay, beta = _make_tokens(
        *(None if x is None else x.contiguous() for x in tensors),
        None if conv is None else conv.state,
        *(None if x is None else x.contiguous() for x in (*(conv or (None,) * 3)[1:], given.rate, given.shift)),
        num_states, _flat(parts), _flat_gate(given.decay), _flat_gate(given.strength), given.num_heads, given.largest,
    )  # fmt: skip
    num_slots = rows.shape[0]
    made = flat.split([num_slots * part.width for part in parts])
    return Made(
        tuple(x.view(num_slots, part.width) for x, part in zip(made, parts, strict=True)),
        rows,
        None if given.decay is None else log_decay,
        None if given.strength is None else beta,
    )


def _check(
    memory_columns: Tensor | None,
    token_columns: Tensor | None,
    parts: Sequence[Part],
    num_states: int,
    memory: Tensor | None,
    valid: Tensor | None,
    conv: Conv | None,
    gates: Gates | None,
) -> None:
    columns = token_columns if memory_columns is None else memory_columns
    if columns is None:
        raise ValueError("memory_columns or token_columns must be given, got neither")
    if memory is None and num_states != 1:
        raise ValueError(f"memory must be given where there are {num_states} states, got none")
    for name, tensor, dims, meaning in (
        ("memory_columns", memory_columns, 2, "[R, *]"),
        ("token_columns", token_columns, 2, "[S, *]"),
        ("memory", memory, 2, "[S, F]"),
    ):
        if tensor is not None and tensor.dim() != dims:
            raise ValueError(f"{name} must be {meaning}, got shape {list(tensor.shape)}")
    tokens = columns.shape[0] if memory is None else memory.shape[0]
    slots = tokens if memory is None else memory.numel()
    _check_parts(parts, memory_columns, token_columns, conv, gates)
    expected: list[tuple[str, Tensor | None, tuple[int, ...] | None, str, tuple[torch.dtype, ...]]] = [
        ("memory_columns", memory_columns, (slots, _width(memory_columns)), "[R, *]", (columns.dtype,)),
        ("token_columns", token_columns, (tokens, _width(token_columns)), "[S, *]", (columns.dtype,)),
        ("the columns", columns, None, "", _FLOATS),
        ("memory", memory, None, "", (torch.int64,)),
        ("valid", valid, (tokens,), "[S]", (torch.bool,)),
    ]
    if conv is not None:
        channels, width = conv.weight.shape
        shape = (tokens, num_states, width, channels)
        expected += [
            ("conv.state", conv.state, shape, "[B, M, W, C]", _FLOATS),
            ("conv.weight", conv.weight, None, "", _FLOATS),
            ("conv.bias", conv.bias, (channels,), "[C]", _FLOATS),
        ]
    if gates is not None:
        heads = (gates.num_heads,)
        expected += [
            ("gates.rate", gates.rate, heads, "[H]", _FLOATS),
            ("gates.shift", gates.shift, heads, "[H]", _FLOATS),
        ]
    for name, tensor, wanted, meaning, dtypes in expected:
        if tensor is None:
            continue
        if wanted is not None and tuple(tensor.shape) != wanted:
            raise ValueError(f"{name} must be {meaning} = {list(wanted)}, got shape {list(tensor.shape)}")
        if tensor.dtype not in dtypes:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{name} must be of dtype {allowed}, got {tensor.dtype}")
        if tensor.device != columns.device:
            raise ValueError(f"{name} must be on the device of the columns, {columns.device}, got {tensor.device}")
    if conv is not None and not conv.state.is_contiguous():
        raise ValueError(f"conv.state must be contiguous, got strides {list(conv.state.stride())}")


def _width(columns: Tensor | None) -> int:
    return 0 if columns is None else columns.shape[1]


def _check_parts(
    parts: Sequence[Part],
    memory_columns: Tensor | None,
    token_columns: Tensor | None,
    conv: Conv | None,
    gates: Gates | None,
) -> None:
    """Every range of columns and of channels is inside of what was given."""
    if not parts:
        raise ValueError("parts must have one at least, got none")
    channels, taps = (0, 1) if conv is None else conv.weight.shape
    if not 1 <= taps <= LARGEST_WIDTH:
        raise ValueError(f"conv.weight must be [C, W] with a W of 1 to {LARGEST_WIDTH}, got {taps}")
    ranges = [(f"parts[{i}]", part.by_token, part.column, part.width) for i, part in enumerate(parts)]
    if gates is not None:
        for name, gate in (("gates.decay", gates.decay), ("gates.strength", gates.strength)):
            ranges += [] if gate is None else [(name, gate.by_token, gate.column, gates.num_heads)]
        if gates.decay is not None and (gates.rate is None or gates.shift is None):
            raise ValueError("gates.rate and gates.shift must be given with a decay, got none")
    for name, by_token, column, width in ranges:
        there = _width(token_columns if by_token else memory_columns)
        if not (width >= 1 and 0 <= column <= there - width):
            which = "token_columns" if by_token else "memory_columns"
            raise ValueError(f"{name} must lie in the {there} {which}, got {width} from {column}")
    for i, part in enumerate(parts):
        if part.channel >= 0 and part.channel + part.width > channels:
            raise ValueError(
                f"parts[{i}] must lie in the {channels} channels of conv, got {part.width} from {part.channel}"
            )
        if part.head and (not 1 <= part.head <= LARGEST_HEAD or part.width % part.head):
            raise ValueError(
                f"parts[{i}].head must be a divisor of its width, {part.width}, at most {LARGEST_HEAD}, got {part.head}"
            )
