"""The gated unit of a feed-forward: SiLU(gate) * up, of `[S, 2W]` with the gates in front, and its backward.

    y = g sigmoid(g) u        du = dy g sigmoid(g)        dg = dy u sigmoid(g) (1 + g sigmoid(-g))

In float32, rounded once. Both gradients go into the two halves of one tensor, which is what the product before it takes.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import block_of, cdiv, sigmoids
from linear_moe.kernels.launch import launch_kernel


class Launch(NamedTuple):
    """Launch parameters of both passes."""

    numbers: int
    """Of a tile of the output, rows times columns."""
    columns: int
    num_warps: int


# From a frozen table, derived, not measured. 16 numbers a thread are two loads of 16 bytes of the gate, and two of what is
# gated, in bfloat16. A row is read 2 kB at a time, more would not help; of a narrow expert's rows several share a program,
# which one alone would give too little to do. Registers are no limit: 32 forward, up to 72 backward.
LAUNCH = Launch(numbers=2048, columns=1024, num_warps=4)


@triton.jit
def _tile(num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows (int64) and columns of this program's tile, and which of them there are."""
    NUM_TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    row = (program // NUM_TILES).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % NUM_TILES) * COLUMNS + tl.arange(0, COLUMNS)
    return row[:, None], column[None, :], (row < num_rows)[:, None] & (column < WIDTH)[None, :]


@triton.jit
def _forward_kernel(x_ptr, output_ptr, num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, inside = _tile(num_rows, WIDTH, ROWS, COLUMNS)
    at = x_ptr + row * (2 * WIDTH) + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    opened, _ = sigmoids(gate)
    output = gate * opened * up
    tl.store(output_ptr + row * WIDTH + column, output.to(output_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    d_output_ptr, x_ptr, d_x_ptr, num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, column, inside = _tile(num_rows, WIDTH, ROWS, COLUMNS)
    at = row * (2 * WIDTH) + column
    gate = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    d_output = tl.load(d_output_ptr + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    opened, shut = sigmoids(gate)
    d_gate = d_output * up * (opened * (1.0 + gate * shut))
    d_up = d_output * (gate * opened)
    tl.store(d_x_ptr + at, d_gate.to(d_x_ptr.dtype.element_ty), mask=inside)
    tl.store(d_x_ptr + at + WIDTH, d_up.to(d_x_ptr.dtype.element_ty), mask=inside)


def _grid(num_rows: int, width: int) -> tuple[int, dict[str, int]]:
    """Programs, and their constants."""
    columns = block_of(width, LAUNCH.columns)
    rows = LAUNCH.numbers // columns
    sizes = {"WIDTH": width, "ROWS": rows, "COLUMNS": columns, "num_warps": LAUNCH.num_warps}
    return cdiv(num_rows, rows) * cdiv(width, columns), sizes


def forward(x: Tensor) -> Tensor:
    """`x` `[S, 2W]`, contiguous: `[S, W]` in its dtype."""
    num_rows, width = x.shape[0], x.shape[1] // 2
    output = x.new_empty(num_rows, width)
    if output.numel():
        programs, sizes = _grid(num_rows, width)
        launch_kernel(_forward_kernel, programs, x, output, num_rows, **sizes)
    return output


def backward(d_output: Tensor, x: Tensor) -> Tensor:
    """The gradient of `x` of `d_output` `[S, W]`, both contiguous."""
    num_rows, width = x.shape[0], x.shape[1] // 2
    d_x = x.new_empty(x.shape)
    if d_x.numel():
        programs, sizes = _grid(num_rows, width)
        launch_kernel(_backward_kernel, programs, d_output, x, d_x, num_rows, **sizes)
    return d_x
