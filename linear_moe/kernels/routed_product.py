"""Products of tokens with the matrices of the memories that they are routed to: y_r = W_g x_source(r).

The slots r of memory g lie side by side, and rows of x are read through the index where they are multiplied: nothing is
gathered first. A program makes a tile of one memory's rows. How many a memory has is known on the device only, so that there
are as many programs as they could fill in the worst case, and those without rows end at once.

Where the outputs are a few more than whole tiles, as keys and values with the gates behind them are, the program of the first
tile makes the rest too, of the rows that it has loaded: a tile of their own would cost as much as one that is full.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import block_of, cdiv, new_rows, precision_of
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
    """In bfloat16 on an H100 65,536 routed and 32,768 shared slots of 1,024 inputs and 2,056 outputs take 0.72 ms; with tiles
    of 128 outputs 1.00, with 256 rows of 128 outputs 0.77. torch's grouped product takes 0.78, after 0.14 to gather the rows.
    On normal inputs, which draw more power: 0.79, with 8 neighbours 0.81, with 4 and 3 stages 0.82, with a depth of 128 and 2
    stages 0.90.
    """
    if dtype == torch.float32:
        return Launch(outputs=64, rows=64, depth=32, num_warps=4, num_stages=2)
    return Launch(outputs=256, rows=128, depth=64, num_warps=8, num_stages=4)


TABLE = LaunchTable("routed product", _frozen, lambda dtype: {"num_stages": (2, 3, 4)})
"""By the dtype."""

NEIGHBOURS = 16
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
def _product_kernel(
    x_ptr,
    source_ptr,
    weight_ptr,
    ends_ptr,
    y_ptr,
    y_stride,
    row_tiles,
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
    program = tl.program_id(0)
    first = program // (NEIGHBOURS * WHOLE) * NEIGHBOURS
    width = tl.minimum(row_tiles - first, NEIGHBOURS)
    within = program % (NEIGHBOURS * WHOLE)
    tile = within // width
    group, start, end = _group_of(ends_ptr, first + within % width, GROUPS, GROUPS_BLOCK, ROWS)
    if group >= GROUPS:
        return
    row = (start + tl.arange(0, ROWS)).to(tl.int64)
    exists = row < end
    token = tl.load(source_ptr + row, mask=exists, other=0).to(tl.int64)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = column < OUTPUTS
    depth = tl.arange(0, DEPTH)
    x_at = x_ptr + token[:, None] * INPUTS + depth[None, :]
    matrix_ptr = weight_ptr + group.to(tl.int64) * OUTPUTS * INPUTS
    weight_at = matrix_ptr + column[None, :] * INPUTS + depth[:, None]
    EVEN: tl.constexpr = INPUTS % DEPTH == 0
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
    launch_kernel(
        _product_kernel,
        row_tiles * (outputs // columns if tail else cdiv(outputs, columns)),
        x,
        source,
        weight,
        ends,
        y,
        y.stride(0),
        row_tiles,
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
