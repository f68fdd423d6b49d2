"""The projections of one decoded token of each sequence: of the memories that it picked, of the token, and of its output gate.

What one token costs is the weights that it reads. A program takes a tile of a matrix's rows and multiplies it with as many
tokens as share it, so that a weight is read once for all of them: rows are spread over programs, and each walks along the whole
width. Which slots use a memory is found by counting in front of the walk; a memory that no token picked costs the look alone.
Nothing is sorted, and nothing is added to what another program wrote.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import block_of, cdiv, precision_of
from linear_moe.kernels.launch import launch_kernel
from linear_moe.kernels.launch_tables import LaunchTable
from linear_moe.kernels.operator import operator

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Launch(NamedTuple):
    """Launch parameters, by the number of tokens."""

    tokens: int
    """Of a tile: each weight is read once for so many."""
    rows: int
    """Of a program's tile of a matrix."""
    width: int
    """Channels of a step along the rows."""
    num_warps: int
    num_stages: int


# By the most tokens, the last for any more. Nothing here is measured on a GPU yet. Derived: at one token, three memories and D
# 1024 there are 8,216 rows, 514 programs of 16: four a multiprocessor, which have 64 KiB of weights in flight where 16 KiB
# would hide the latency. More tokens are worth larger tiles, which read the tokens less often; the weights are read once
# whatever the tile. Compiled for Hopper (triton 3.6 and 3.9, bf16) the three take 56, 55 and 155 registers and 32, 48 and 64
# KiB of shared memory; in no dtype anything spills.
LAUNCHES = {
    16: Launch(tokens=16, rows=16, width=256, num_warps=4, num_stages=3),
    32: Launch(tokens=32, rows=32, width=128, num_warps=4, num_stages=4),
    64: Launch(tokens=64, rows=64, width=64, num_warps=4, num_stages=4),
}
TABLE = LaunchTable(
    "decode.projections",
    lambda most, size, dtype: LAUNCHES[most],
    lambda most, size, dtype: {
        "rows": (16, 32, 64),
        "width": (64, 128, 256),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
)
"""By the most tokens, as above, the width of the tokens, and the dtype of the products."""


class Projected(NamedTuple):
    """What a token's projections are."""

    memory: Tensor | None
    """`[S * F, rows]` of its slots' memories, slot f of token s at s * F + f."""
    token: Tensor | None
    """`[S, rows]`"""
    gate: Tensor | None
    """`[S, rows]`"""


@triton.jit
def _slots_of(
    memory_ptr, state, first, num_tokens, FAN_OUT: tl.constexpr, SLOTS_BLOCK: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """TOKENS of the slots of memory `state`, in their order from the `first` on, and how many it has."""
    rank = first + tl.arange(0, TOKENS)
    use = tl.arange(0, SLOTS_BLOCK)
    slot = tl.zeros((TOKENS,), tl.int32)
    count = tl.full((), 0, tl.int32)
    for start in range(0, num_tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        at = token[:, None] * FAN_OUT + use[None, :]
        exists = (token < num_tokens)[:, None] & (use < FAN_OUT)[None, :]
        own = tl.load(memory_ptr + at, mask=exists, other=-1) == state
        # A token uses a memory once. If it does not, its last use counts, and nothing is written out of bounds.
        uses = tl.max(own.to(tl.int32), 1)
        each = tl.max(tl.where(own, at, 0), 1)
        place = count + tl.cumsum(uses, 0) - uses
        here = (uses > 0)[None, :] & (place[None, :] == rank[:, None])
        slot += tl.sum(tl.where(here, each[None, :], 0), 1)
        count += tl.sum(uses, 0)
    return slot, count


@triton.jit
def _product(
    x_ptr, weight_ptr, source, exists, row, in_matrix, SIZE: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of a matrix `[*, SIZE]` times rows of x, both rounded to DTYPE: `[tokens, rows]` float32."""
    product = tl.zeros((source.shape[0], row.shape[0]), tl.float32)
    x_at, weight_at = source.to(tl.int64) * SIZE, row.to(tl.int64) * SIZE
    for start in range(0, SIZE, WIDTH):
        channel = start + tl.arange(0, WIDTH)
        inside = channel < SIZE
        x = tl.load(x_ptr + x_at[:, None] + channel[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
        weight = tl.load(
            weight_ptr + weight_at[None, :] + channel[:, None], mask=in_matrix[None, :] & inside[:, None], other=0.0
        )
        product = tl.dot(x.to(DTYPE), weight.to(DTYPE), acc=product, input_precision=PRECISION)
    return product


@triton.jit
def project_kernel(
    x_ptr, memory_ptr, memory_weight_ptr, memory_bias_ptr, token_weight_ptr, gate_weight_ptr, memory_out_ptr,
    token_out_ptr, gate_out_ptr, num_tokens, num_tiles, STATES: tl.constexpr, FAN_OUT: tl.constexpr,
    SLOTS_BLOCK: tl.constexpr, MEMORY_ROWS: tl.constexpr, TOKEN_ROWS: tl.constexpr, GATE_ROWS: tl.constexpr,
    SIZE: tl.constexpr, BY_SLOT: tl.constexpr, DTYPE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    MEMORY_TILES: tl.constexpr = (MEMORY_ROWS + ROWS - 1) // ROWS
    TOKEN_TILES: tl.constexpr = (TOKEN_ROWS + ROWS - 1) // ROWS
    # Neighbours share a weight.
    first = (tl.program_id(0) % num_tiles) * TOKENS
    unit = tl.program_id(0) // num_tiles
    tile = unit - STATES * MEMORY_TILES
    # What the three kinds of tiles have in common is in one place: a walk of each would have shared memory of its own.
    target = first + tl.arange(0, TOKENS)
    source, count = target, num_tokens
    state = tl.full((), 0, tl.int32)
    if tile < 0:
        weight_ptr, out_ptr, num_rows = memory_weight_ptr, memory_out_ptr, MEMORY_ROWS
        if MEMORY_ROWS > 0:
            state, tile = unit // MEMORY_TILES, unit % MEMORY_TILES
            target, count = _slots_of(memory_ptr, state, first, num_tokens, FAN_OUT, SLOTS_BLOCK, TOKENS)
            weight_ptr += state.to(tl.int64) * (MEMORY_ROWS * SIZE)
            if BY_SLOT:
                source = target
            else:
                source = target // FAN_OUT
    elif tile < TOKEN_TILES:
        weight_ptr, out_ptr, num_rows = token_weight_ptr, token_out_ptr, TOKEN_ROWS
    else:
        weight_ptr, out_ptr, num_rows = gate_weight_ptr, gate_out_ptr, GATE_ROWS
        tile -= TOKEN_TILES
    if first < count:
        exists = first + tl.arange(0, TOKENS) < count
        row = tile * ROWS + tl.arange(0, ROWS)
        in_matrix = row < num_rows
        product = _product(x_ptr, weight_ptr, source, exists, row, in_matrix, SIZE, WIDTH, DTYPE, PRECISION)
        if memory_bias_ptr is not None:
            bias = tl.load(memory_bias_ptr + state * MEMORY_ROWS + row, mask=in_matrix, other=0.0)
            product += bias.to(tl.float32)[None, :]
        at = target.to(tl.int64)[:, None] * num_rows + row[None, :]
        tl.store(out_ptr + at, product.to(DTYPE), mask=exists[:, None] & in_matrix[None, :])


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _rows_of(weight: Tensor | None) -> int:
    return 0 if weight is None else weight.shape[-2]


def _room(
    x: Tensor, memory: Tensor | None, memory_weight: Tensor | None, token_weight: Tensor | None,
    gate_weight: Tensor | None, by_slot: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The results' tensors, an empty one where nothing is made."""
    slots = 0 if memory is None else memory.numel()
    tokens = 0 if by_slot else x.shape[0]
    memory_out = x.new_empty(slots, _rows_of(memory_weight), dtype=dtype)
    return (
        memory_out,
        x.new_empty(tokens, _rows_of(token_weight), dtype=dtype),
        x.new_empty(tokens, _rows_of(gate_weight), dtype=dtype),
    )


@operator("decode_projections")
def _project(
    x: Tensor, memory: Tensor | None, memory_weight: Tensor | None, memory_bias: Tensor | None,
    token_weight: Tensor | None, gate_weight: Tensor | None, by_slot: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    made = _room(x, memory, memory_weight, token_weight, gate_weight, by_slot, dtype)
    fan_out = 1 if memory is None else memory.shape[1]
    num_tokens = x.shape[0] // fan_out if by_slot else x.shape[0]
    most = min((most for most in LAUNCHES if num_tokens <= most), default=max(LAUNCHES))
    launch = TABLE.pick(x.device, most, x.shape[1], dtype)
    states = 0 if memory_weight is None else memory_weight.shape[0]
    rows = [_rows_of(weight) for weight in (memory_weight, token_weight, gate_weight)]
    tiles = [cdiv(count, launch.rows) for count in rows]
    num_tiles = cdiv(num_tokens, launch.tokens)
    programs = num_tiles * (states * tiles[0] + tiles[1] + tiles[2])
    if programs:
        # A matrix that there is not stands for no tile; its pointer is any.
        given = [weight for weight in (memory_weight, token_weight, gate_weight) if weight is not None]
        with torch.cuda.device_of(x):
            launch_kernel(
                project_kernel,
                programs,
                x,
                memory,
                given[0] if memory_weight is None else memory_weight,
                memory_bias,
                given[0] if token_weight is None else token_weight,
                given[0] if gate_weight is None else gate_weight,
                *made,
                num_tokens,
                num_tiles,
                STATES=states,
                FAN_OUT=fan_out,
                SLOTS_BLOCK=1 << (fan_out - 1).bit_length(),
                MEMORY_ROWS=rows[0],
                TOKEN_ROWS=rows[1],
                GATE_ROWS=rows[2],
                SIZE=x.shape[1],
                BY_SLOT=by_slot,
                DTYPE=_DTYPES[dtype],
                TOKENS=launch.tokens,
                ROWS=launch.rows,
                WIDTH=block_of(x.shape[1], launch.width),
                PRECISION=precision_of(dtype),
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )
    return made


@torch.library.register_fake("linear_moe::decode_projections")
def _(x, memory, memory_weight, memory_bias, token_weight, gate_weight, by_slot, dtype):
    return _room(x, memory, memory_weight, token_weight, gate_weight, by_slot, dtype)


def project_token(
    x: Tensor,
    memory: Tensor | None,
    memory_weight: Tensor | None,
    token_weight: Tensor | None = None,
    gate_weight: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Projected:
    """Each token times the matrices of its memories, and times those that all tokens share. Without gradients.

    Nothing waits for the device, so the values of `memory` are not checked.

    Args:
        x: `[S, I]` float32, bfloat16 or float16.
        memory: `[S, F]` int64, below M: the memories of each token, each once. None without `memory_weight`.
        memory_weight: `[M, O, I]` or None.
        token_weight: `[O', I]` or None.
        gate_weight: `[O'', I]` or None.
        dtype: of the results, and what x and the weights are rounded to before: that of x unless given.

    Returns:
        `[S * F, O]`, slot f of token s at s * F + f; `[S, O']`; `[S, O'']`; each summed in float32, None without its weight.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    dtype = dtype or x.dtype
    _check(x, memory, memory_weight, None, token_weight, gate_weight, dtype, by_slot=False)
    made = _project(
        *(None if tensor is None else tensor.contiguous() for tensor in (x, memory, memory_weight)), None,
        *(None if tensor is None else tensor.contiguous() for tensor in (token_weight, gate_weight)), False, dtype,
    )  # fmt: skip
    weights = (memory_weight, token_weight, gate_weight)
    return Projected(*(None if weight is None else out for weight, out in zip(weights, made, strict=True)))


def project_slots(
    x: Tensor, memory: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Each slot's row times the matrix of its memory, plus its bias. Without gradients.

    Args:
        x: `[S * F, I]` float32, bfloat16 or float16; slot f of token s at s * F + f.
        memory: `[S, F]` int64, below M: the memories of each token, each once. Not checked.
        weight: `[M, O, I]`.
        bias: `[M, O]` or None.
        dtype: of the result, and what x and the weight are rounded to before: that of x unless given.

    Returns:
        `[S * F, O]`, summed in float32 with the bias.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    dtype = dtype or x.dtype
    _check(x, memory, weight, bias, None, None, dtype, by_slot=True)
    bias = None if bias is None else bias.contiguous()
    made: Tensor = _project(x.contiguous(), memory.contiguous(), weight.contiguous(), bias, None, None, True, dtype)[0]
    return made


def _check(
    x: Tensor,
    memory: Tensor | None,
    memory_weight: Tensor | None,
    memory_bias: Tensor | None,
    token_weight: Tensor | None,
    gate_weight: Tensor | None,
    dtype: torch.dtype,
    *,
    by_slot: bool,
) -> None:
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"x must be [{'S * F' if by_slot else 'S'}, I], got shape {list(x.shape)}")
    if dtype not in _FLOATS:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if (memory is None) != (memory_weight is None):
        raise ValueError("memory and memory_weight must be given together")
    if memory is not None and (memory.dim() != 2 or memory.shape[1] < 1):
        raise ValueError(f"memory must be [S, F] with F at least 1, got shape {list(memory.shape)}")
    size = x.shape[1]
    name = "weight" if by_slot else "memory_weight"
    for what, weight, dims, meaning in (
        (name, memory_weight, 3, "[M, O, I]"),
        ("token_weight", token_weight, 2, "[O', I]"),
        ("gate_weight", gate_weight, 2, "[O'', I]"),
    ):
        if weight is None:
            continue
        if weight.dim() != dims or weight.shape[-1] != size:
            raise ValueError(f"{what} must be {meaning} with I = {size}, got shape {list(weight.shape)}")
    found = {str(weight.dtype) for weight in (memory_weight, token_weight, gate_weight) if weight is not None}
    if len(found) != 1:
        raise ValueError(f"the weights must be of one dtype, got {', '.join(sorted(found)) or 'no weight'}")
    fan_out = 1 if memory is None else memory.shape[1]
    slots = None if memory is None else memory.numel()
    tokens = x.shape[0] if memory is None or not by_slot else memory.shape[0]
    for what, tensor, shape, meaning, dtypes in (
        ("x", x, (slots, size) if by_slot else None, "[S * F, I]", _FLOATS),
        ("memory", memory, (tokens, fan_out), "[S, F]", (torch.int64,)),
        (name, memory_weight, None, "", _FLOATS),
        ("bias", memory_bias, None if memory_weight is None else tuple(memory_weight.shape[:2]), "[M, O]", _FLOATS),
        ("token_weight", token_weight, None, "", _FLOATS),
        ("gate_weight", gate_weight, None, "", _FLOATS),
    ):
        if tensor is None:
            continue
        if shape is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{what} must be {meaning} = {list(shape)}, got shape {list(tensor.shape)}")
        if tensor.dtype not in dtypes:
            allowed = ", ".join(str(each).removeprefix("torch.") for each in dtypes)
            raise ValueError(f"{what} must be of dtype {allowed}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{what} must be on the device of x, {x.device}, got {tensor.device}")
