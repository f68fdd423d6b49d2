"""A rule's gates of declared forms, made of a few columns of its projections in one pass, and their backward pass.

    log_decay = -exp(rate) softplus(x + shift)        dx = -exp(rate) sigmoid(x + shift) dlog_decay
    beta = largest sigmoid(y)                         dy = largest sigmoid(y) sigmoid(-y) dbeta

    dshift = sum dx        drate = sum log_decay dlog_decay

A number a head and token each: so little that ten small kernels of PyTorch's forward, and fourteen backward, took as long to
launch as the convolution takes to run. The two sums are made of every program's own, always in one order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import cdiv, sigmoids, sum_rows
from linear_moe.kernels.launch import launch_kernel

NUMBERS = 256
"""Of a program's tile of tokens and heads; from a frozen table, measured on an H100 (torch 2.11, triton 3.6; us at 98,304
slots, H 4, columns of rows 4,224 bytes apart): 4.2 forward, 10.5 backward; 128 4.4, 12.5; 512 5.1, 11.2; 2,048 6.2, 12.5."""


@triton.jit
def softplus(x):
    """max(x, 0) + log(1 + e), e = exp(-|x|): the logarithm is corrected for what 1 + e loses of a small e."""
    e = tl.exp(-tl.abs(x))
    whole = 1.0 + e
    lost = whole - 1.0
    return tl.maximum(x, 0.0) + tl.where(lost > 0.0, tl.log(whole) * (e / tl.where(lost > 0.0, lost, 1.0)), e)


@triton.jit
def _tile(num_rows, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows (int64) and heads of this program's tile, and which of them there are."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    head = tl.arange(0, BLOCK)[None, :]
    return row, head, (row < num_rows) & (head < HEADS)


@triton.jit
def _load(ptr, stride, row, head, inside):
    return tl.load(ptr + row * stride + head, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, rate_ptr, shift_ptr, log_decay_ptr, beta_ptr, x_stride, y_stride, num_rows, largest, HEADS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A null pointer leaves its part out."""
    row, head, inside = _tile(num_rows, HEADS, ROWS, BLOCK)
    at = row * HEADS + head
    if x_ptr is not None:
        x = _load(x_ptr, x_stride, row, head, inside) + _load(shift_ptr, 0, row, head, inside)
        log_decay = -tl.exp(_load(rate_ptr, 0, row, head, inside)) * softplus(x)
        tl.store(log_decay_ptr + at, log_decay, mask=inside)
    if y_ptr is not None:
        opened, _ = sigmoids(_load(y_ptr, y_stride, row, head, inside))
        tl.store(beta_ptr + at, largest * opened, mask=inside)


@triton.jit
def _backward_kernel(
    d_log_decay_ptr, d_beta_ptr, x_ptr, y_ptr, rate_ptr, shift_ptr, d_x_ptr, d_y_ptr, sums_ptr, x_stride, y_stride, d_x_stride,
    d_y_stride, num_rows, largest, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`sums`: of dx and of log_decay dlog_decay over the program's rows `[P, 2, H]`."""
    row, head, inside = _tile(num_rows, HEADS, ROWS, BLOCK)
    at = row * HEADS + head
    if x_ptr is not None:
        x = _load(x_ptr, x_stride, row, head, inside) + _load(shift_ptr, 0, row, head, inside)
        pace = -tl.exp(_load(rate_ptr, 0, row, head, inside))
        d_log_decay = tl.load(d_log_decay_ptr + at, mask=inside, other=0.0)
        opened, _ = sigmoids(x)
        d_x = d_log_decay * pace * opened
        tl.store(d_x_ptr + row * d_x_stride + head, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
        sums = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * HEADS + tl.arange(0, BLOCK)
        in_heads = tl.arange(0, BLOCK) < HEADS
        tl.store(sums, tl.sum(d_x, 0), mask=in_heads)
        tl.store(sums + HEADS, tl.sum(d_log_decay * pace * softplus(x), 0), mask=in_heads)
    if y_ptr is not None:
        opened, shut = sigmoids(_load(y_ptr, y_stride, row, head, inside))
        d_y = tl.load(d_beta_ptr + at, mask=inside, other=0.0) * (largest * opened * shut)
        tl.store(d_y_ptr + row * d_y_stride + head, d_y.to(d_y_ptr.dtype.element_ty), mask=inside)


def _sizes(num_rows: int, heads: int) -> tuple[int, dict[str, int]]:
    """Programs, and their constants."""
    block = 1 << (heads - 1).bit_length()
    rows = max(NUMBERS // block, 1)
    return cdiv(num_rows, rows), {"HEADS": heads, "ROWS": rows, "BLOCK": block, "num_warps": 4}


class Gates(NamedTuple):
    """What is not made is empty."""

    log_decay: Tensor
    beta: Tensor


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def forward(x: Tensor | None, y: Tensor | None, rate: Tensor | None, shift: Tensor | None, largest: float) -> Gates:
    """The gates `[R, H]` of x and y `[R, H]`, one of which is given, whose numbers lie side by side in a row."""
    given = x if y is None else y
    assert given is not None
    made = Gates(*(given.new_empty(0 if z is None else z.shape, dtype=torch.float32) for z in (x, y)))
    if given.numel():
        programs, sizes = _sizes(*given.shape)
        launch_kernel(
            _forward_kernel,
            programs,
            x,
            y,
            rate,
            shift,
            *made,
            _stride(x),
            _stride(y),
            given.shape[0],
            largest,
            **sizes,
        )
    return made


def backward(
    d_log_decay: Tensor, d_beta: Tensor, x: Tensor | None, y: Tensor | None, rate: Tensor | None, shift: Tensor | None,
    largest: float, d_x: Tensor | None, d_y: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """Fill `d_x` and `d_y` `[R, H]`, whose rows may lie apart, and return the gradients of the shift and the rate, `[2, H]`
    float32, or None without a decay. What `forward` was given, and the gradients of what it made, contiguous.
    """
    given = x if y is None else y
    assert given is not None
    programs, sizes = _sizes(*given.shape)
    sums = None if x is None else given.new_empty(programs, 2, given.shape[1], dtype=torch.float32)
    if given.numel():
        launch_kernel(
            _backward_kernel, programs, d_log_decay, d_beta, x, y, rate, shift, d_x, d_y, sums, _stride(x), _stride(y),
            _stride(d_x), _stride(d_y), given.shape[0], largest, **sizes,
        )  # fmt: skip
    return None if sums is None else sum_rows(sums, torch.float32)
