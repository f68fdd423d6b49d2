"""Products of tokens with the matrices of the memories that they are routed to: y_r = W_g x_source(r).

The slots r of memory g lie side by side, and rows of x are read through the index where they are multiplied: nothing is
gathered first. A tile is of one memory's rows. How many a memory has is known on the device only, so that there are as many
tiles as they could fill in the worst case, and those without rows are passed over.

There is a program a multiprocessor, which makes one tile after another, and looks for the rows of the next before it makes
this one: the memory's latency, three times over, would be a tenth of a tile's time.

Where the outputs are a few more than whole tiles, as keys and values with the gates behind them are, the program of the first
tile makes the rest too, of the rows that it has loaded: a tile of their own would cost as much as one that is full.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import block_of, cdiv, new_rows, num_processors, precision_of
from linear_moe.kernels.launch import launch_kernel
from linear_moe.kernels.launch_tables import LaunchTable

MOST_TAIL = 32
"""Outputs past the whole tiles that are made beside the first: more are a tile of their own."""


class Launch(NamedTuple):
    """Launch parameters."""

    outputs: int
    """Of a tile."""
    rows: int
    """Of a tile."""
    depth: int
    """Numbers of each sum at a time."""
    num_warps: int
    num_stages: int


def _frozen(dtype: torch.dtype) -> Launch:
    """In bfloat16 on an H100 (torch 2.11, triton 3.6) 65,536 routed and 32,768 shared slots of 1,024 normal inputs and 2,056
    outputs take 0.73 ms, with 16 neighbours too, with 4 stages 0.76; a program a tile took 0.79 to 0.81, on tiles of 128
    outputs or of 256 rows by 128 longer. torch's grouped product took 0.02 less than that, after 0.14 to gather the rows.
    """
    if dtype == torch.float32:
        return Launch(outputs=64, rows=64, depth=32, num_warps=4, num_stages=2)
    return Launch(outputs=256, rows=128, depth=64, num_warps=8, num_stages=3)


TABLE = LaunchTable("routed product", _frozen, lambda dtype: {"num_stages": (2, 3, 4)})
"""By the dtype."""

NEIGHBOURS = 8
"""Tiles of rows whose programs go through the outputs together, so that what they load is in the L2 cache."""


@triton.jit
def _group_of(ends_ptr, tile, GROUPS: tl.constexpr, GROUPS_BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The group of a tile of `ROWS` rows, `GROUPS` if there is none; where the tile starts, and where the group ends."""
    groups = tl.arange(0, GROUPS_BLOCK)
    exists = groups < GROUPS
    ends = tl.load(ends_ptr + groups, mask=exists, other=0)
    starts = tl.load(ends_ptr + groups - 1, mask=exists & (groups > 0), other=0)
    tiles = tl.where(exists, (ends - starts + ROWS - 1) // ROWS, 0)
    tile_ends = tl.cumsum(tiles, 0)
    group = tl.sum((exists & (tile_ends <= tile)).to(tl.int32), 0)
    own = groups == group
    before = tl.sum(tl.where(own, tile_ends - tiles, 0), 0)
    start = tl.sum(tl.where(own, starts, 0), 0) + (tile - before) * ROWS
    return group, start, tl.sum(tl.where(own, ends, 0), 0)


@triton.jit
def _tile_of(
    program, source_ptr, ends_ptr, row_tiles, GROUPS: tl.constexpr, GROUPS_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    WHOLE: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """A tile's outputs, group, first row and the group's last, and the tokens that it reads. `GROUPS` of one without rows."""
    first = program // (NEIGHBOURS * WHOLE) * NEIGHBOURS
    width = tl.maximum(tl.minimum(row_tiles - first, NEIGHBOURS), 1)
    within = program % (NEIGHBOURS * WHOLE)
    tile = within // width
    group, start, end = _group_of(ends_ptr, first + within % width, GROUPS, GROUPS_BLOCK, ROWS)
    row = (start + tl.arange(0, ROWS)).to(tl.int64)
    token = tl.load(source_ptr + row, mask=row < end, other=0)
    # A register a row, which is kept while the tile before is made; tokens are fewer than slots, whose ends are int32.
    token = token.to(tl.int32)
    return tile, group, start, end, token


@triton.jit
def _product_kernel(
    x_ptr,
    source_ptr,
    weight_ptr,
    ends_ptr,
    y_ptr,
    y_stride,
    row_tiles,
    num_tiles,
    num_programs,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TAIL: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    WHOLE: tl.constexpr = OUTPUTS // COLUMNS if TAIL > 0 else (OUTPUTS + COLUMNS - 1) // COLUMNS
    EVEN: tl.constexpr = INPUTS % DEPTH == 0
    first = tl.program_id(0)
    depth = tl.arange(0, DEPTH)
    tile, group, start, end, token = _tile_of(
        first, source_ptr, ends_ptr, row_tiles, GROUPS, GROUPS_BLOCK, ROWS, WHOLE, NEIGHBOURS
    )
    for this in range(first, num_tiles, num_programs):
        next_tile, next_group, next_start, next_end, next_token = _tile_of(
            this + num_programs, source_ptr, ends_ptr, row_tiles, GROUPS, GROUPS_BLOCK, ROWS, WHOLE, NEIGHBOURS
        )
        if group < GROUPS:
            row = (start + tl.arange(0, ROWS)).to(tl.int64)
            exists = row < end
            column = tile * COLUMNS + tl.arange(0, COLUMNS)
            in_columns = column < OUTPUTS
            x_at = x_ptr + token[:, None].to(tl.int64) * INPUTS + depth[None, :]
            matrix_ptr = weight_ptr + group.to(tl.int64) * OUTPUTS * INPUTS
            weight_at = matrix_ptr + column[None, :] * INPUTS + depth[:, None]
            y = tl.zeros((ROWS, COLUMNS), tl.float32)
            if TAIL > 0:
                if tile == 0:
                    last = WHOLE * COLUMNS + tl.arange(0, TAIL)
                    last_at = matrix_ptr + last[None, :] * INPUTS + depth[:, None]
                    rest = tl.zeros((ROWS, TAIL), tl.float32)
                    for at in range(0, INPUTS, DEPTH):
                        inside = (depth < INPUTS - at) | EVEN
                        x = tl.load(x_at + at, mask=inside[None, :], other=0.0)
                        weight = tl.load(weight_at + at, mask=inside[:, None], other=0.0)
                        y = tl.dot(x, weight, y, input_precision=PRECISION)
                        weight = tl.load(last_at + at, mask=inside[:, None] & (last < OUTPUTS)[None, :], other=0.0)
                        rest = tl.dot(x, weight, rest, input_precision=PRECISION)
                    y_at = y_ptr + row[:, None] * y_stride + last[None, :]
                    tl.store(y_at, rest.to(y_ptr.dtype.element_ty), mask=exists[:, None] & (last < OUTPUTS)[None, :])
            if (TAIL == 0) | (tile > 0):
                for at in range(0, INPUTS, DEPTH):
                    inside = (depth < INPUTS - at) | EVEN
                    x = tl.load(x_at + at, mask=inside[None, :], other=0.0)
                    weight = tl.load(weight_at + at, mask=inside[:, None] & in_columns[None, :], other=0.0)
                    y = tl.dot(x, weight, y, input_precision=PRECISION)
            y_at = y_ptr + row[:, None] * y_stride + column[None, :]
            tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=exists[:, None] & in_columns[None, :])
        tile, group, start, end, token = next_tile, next_group, next_start, next_end, next_token


def product(x: Tensor, source: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Row r is `x[source[r]]` times the matrix of its group: `[R, O]`.

    `x` is `[S, I]`, `source` `[R]` int64, sorted by group, `weight` `[G, O, I]`, `ends` `[G]` int32, R at most. All are
    contiguous, but for the product, whose rows may lie further apart than O. Rows past the last end are anything.
    """
    (groups, outputs, inputs), rows = weight.shape, source.shape[0]
    y = new_rows(x, rows, outputs)
    if y.numel() == 0:
        return y
    launch = TABLE.pick(x.device, x.dtype)
    columns, tail = _tiles(outputs, launch.outputs)
    row_tiles = cdiv(rows, launch.rows) + groups
    num_tiles = row_tiles * (outputs // columns if tail else cdiv(outputs, columns))
    num_programs = min(num_processors(x.device), num_tiles)
    launch_kernel(
        _product_kernel,
        num_programs,
        x,
        source,
        weight,
        ends,
        y,
        y.stride(0),
        row_tiles,
        num_tiles,
        num_programs,
        INPUTS=inputs,
        OUTPUTS=outputs,
        GROUPS=groups,
        GROUPS_BLOCK=1 << (groups - 1).bit_length(),
        ROWS=launch.rows,
        COLUMNS=columns,
        DEPTH=block_of(inputs, launch.depth),
        TAIL=tail,
        NEIGHBOURS=NEIGHBOURS,
        PRECISION=precision_of(x.dtype),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return y


def _tiles(outputs: int, tile: int) -> tuple[int, int]:
    """Outputs of a tile, and those past the whole tiles, as a block, that the first tile's program makes; 0 if it does not."""
    tile = block_of(outputs, tile)
    over = outputs % tile
    return tile, block_of(over) if outputs > tile and 0 < over <= MOST_TAIL else 0
