"""A branch added to the residual stream, and the RMSNorm that reads the sum, in one pass each way.

    s = x + b        n = s / sqrt(mean(s^2) + eps)        y = w n

    dn = w dy        dw = sum over rows of dy n        dx = db = ds + (dn - n mean(dn n)) / sqrt(mean(s^2) + eps)

with ds what comes back along the stream itself. All of it in float32 but s, which is rounded to the dtype of the stream, as
whoever reads it later sees it. Kept for the backward pass are s and one number a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import cdiv, sum_rows
from linear_moe.kernels.launch import launch_kernel

LARGEST_WIDTH = 8192
"""A program has a row in its registers: 16 numbers a thread at this width."""


class Launch(NamedTuple):
    """Launch parameters of both passes."""

    forward: int
    """Numbers of a row that a thread holds forward, where a row has so many."""
    backward: int
    """The same backward."""
    rows: int
    """Rows of a program backward, one after the other: they share one row of partial sums of the weight's gradient."""


# From a frozen table, derived, not measured. What hides the wait for a row's sum is other rows: forward a program is a row. 8
# numbers a thread forward, 16 backward were fastest for the norm of `combine` at rows of the same 1,024. Backward a thread of
# 16 then takes 102 registers of an H100, so that 9 programs share a multiprocessor: 16 rows make 1,024 programs of 16,384
# tokens, which are all on the GPU at once, and partial sums of 1/40 of the traffic.
LAUNCH = Launch(forward=8, backward=16, rows=16)
MOST_WARPS = 16


class Forward(NamedTuple):
    """What a forward pass makes."""

    sum: Tensor | None
    """`[..., D]` in the dtype of the stream; None where nothing was added."""
    normed: Tensor
    """`[..., D]`"""
    factor: Tensor
    """`[...]` float32: 1 / sqrt(mean(s^2) + eps)."""


class Gradients(NamedTuple):
    """Of the loss, by what was given."""

    residual: Tensor
    branch: Tensor | None
    """Where it was asked for in another dtype than that of the residual's."""
    weight: Tensor | None


@triton.jit
def _forward_kernel(
    residual_ptr, branch_ptr, weight_ptr, sum_ptr, normed_ptr, factor_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = row * WIDTH + column
    x = tl.load(residual_ptr + at, mask=inside, other=0.0)
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + branch.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, x, mask=inside)
    x = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed_ptr + at, (x * factor * weight).to(normed_ptr.dtype.element_ty), mask=inside)
    tl.store(factor_ptr + row, factor)


@triton.jit
def _backward_kernel(
    d_sum_ptr, d_normed_ptr, sum_ptr, factor_ptr, weight_ptr, d_residual_ptr, d_branch_ptr, d_weight_ptr, num_rows,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    first_row = program * ROWS
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    for step in range(tl.minimum(num_rows - first_row, ROWS).to(tl.int32)):
        row = first_row + step
        at = row * WIDTH + column
        factor = tl.load(factor_ptr + row)
        normed = tl.load(sum_ptr + at, mask=inside, other=0.0).to(tl.float32) * factor
        d_output = tl.load(d_normed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if d_weight_ptr is not None:
            d_weight += d_output * normed
        d_normed = d_output * weight
        along = tl.sum(d_normed * normed, 0) / WIDTH
        d_x = (d_normed - normed * along) * factor
        if d_sum_ptr is not None:
            d_x += tl.load(d_sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_residual_ptr + at, d_x.to(d_residual_ptr.dtype.element_ty), mask=inside)
        if d_branch_ptr is not None:
            tl.store(d_branch_ptr + at, d_x.to(d_branch_ptr.dtype.element_ty), mask=inside)
    if d_weight_ptr is not None:
        tl.store(d_weight_ptr + program * WIDTH + column, d_weight, mask=inside)


def _sizes(width: int, numbers: int) -> dict[str, int]:
    # Of the width alone: a row's sum is added up alike beside any number of other rows.
    block = 1 << (width - 1).bit_length()
    return {"WIDTH": width, "BLOCK": block, "num_warps": min(max(block // (32 * numbers), 1), MOST_WARPS)}


def forward(residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> Forward:
    """Add `branch` to `residual`, both `[..., D]`, and norm the sum under `weight` `[D]`, to `dtype`. All is contiguous."""
    # What comes out is no view, nor made one: a sharded block's outputs should be none.
    num_rows, width = residual.numel() // residual.shape[-1], residual.shape[-1]
    summed = None if branch is None else torch.empty_like(residual)
    normed = torch.empty_like(residual, dtype=dtype)
    factor = residual.new_empty(residual.shape[:-1], dtype=torch.float32)
    if num_rows:
        launch_kernel(
            _forward_kernel,
            num_rows,
            residual,
            branch,
            weight,
            summed,
            normed,
            factor,
            eps,
            **_sizes(width, LAUNCH.forward),
        )
    return Forward(summed, normed, factor)


def backward(
    d_sum: Tensor | None, d_normed: Tensor, summed: Tensor, factor: Tensor, weight: Tensor, *,
    branch_dtype: torch.dtype | None, want_weight: bool,
) -> Gradients:  # fmt: skip
    """The gradients: the residual's in the dtype of `summed`, the branch's if another `branch_dtype` is given, the weight's."""
    num_rows, width = factor.numel(), summed.shape[-1]
    d_residual = torch.empty_like(summed)
    d_branch = None if branch_dtype is None else torch.empty_like(summed, dtype=branch_dtype)
    if num_rows == 0:
        return Gradients(d_residual, d_branch, torch.zeros_like(weight) if want_weight else None)
    num_programs = cdiv(num_rows, LAUNCH.rows)
    parts = weight.new_empty(num_programs, width, dtype=torch.float32) if want_weight else None
    launch_kernel(
        _backward_kernel,
        num_programs,
        d_sum,
        d_normed,
        summed,
        factor,
        weight,
        d_residual,
        d_branch,
        parts,
        num_rows,
        ROWS=LAUNCH.rows,
        **_sizes(width, LAUNCH.backward),
    )
    return Gradients(d_residual, d_branch, None if parts is None else sum_rows(parts, weight.dtype))
