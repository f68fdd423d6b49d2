"""What a token reads: the weighted sum of its slots' reads, the norm over each head's channels, and the gate; and its backward.

    x = sum_f g_f r_f      u = x / sqrt(mean(x^2) + eps)      y = w u silu(z)

    dz = dy w u silu'(z)   du = dy w silu(z)   dw = sum over tokens and heads of dy u silu(z)
    dx = (du - u mean(du u)) / sqrt(mean(x^2) + eps)          dr_f = g_f dx          dg_f = sum over heads of <dx, r_f>

All of it in float32. The reads lie in the order of the plan: slot f of token s at `place[s * F + f]`. A slot has one token, so
its gradient is written where the slot was read, and nothing is added to what another program wrote. The backward pass makes
x and its norm again: it must read r_f anyway, and then they are free.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import cdiv

LARGEST_VALUE_DIM = 256


class Launch(NamedTuple):
    """Launch parameters of a kernel."""

    tile: int
    """Numbers of a program's tile: rows times V, rounded up to a power of two."""
    num_warps: int


# Not measured on a GPU yet. Derived: both passes wait for memory only. A thread loads 16 numbers a slot, 32 bytes in 16 bits, so
# that at F = 3 a warp has 4 KiB under way; a row of 256 channels is one warp's, and its sums need no shared memory.
FORWARD = Launch(tile=2048, num_warps=4)
BACKWARD = Launch(tile=2048, num_warps=4)


class Gradients(NamedTuple):
    """Of the loss, by what was combined."""

    reads: Tensor
    weights: Tensor | None
    gate: Tensor
    norm_weight: Tensor


@triton.jit
def _real_of(valid_ptr, token, exists):
    """Which tokens are not pads."""
    real = exists
    if valid_ptr is not None:
        real = exists & (tl.load(valid_ptr + token, mask=exists, other=0) != 0)
    return real


@triton.jit
def _slot_offsets(place_ptr, slot, head, exists, column, HEADS: tl.constexpr, V: tl.constexpr):
    """Where the channels of one head of each slot lie, among the reads as among their gradients."""
    place = tl.load(place_ptr + slot, mask=exists, other=0)
    return ((place * HEADS + head) * V)[:, None] + column[None, :]


@triton.jit
def _weigh(x, weights_ptr, slot, exists):
    """Rows times their slots' weights, which are 1 if there are none."""
    if weights_ptr is not None:
        x = x * tl.load(weights_ptr + slot, mask=exists, other=0.0)[:, None]
    return x


@triton.jit
def _mix(
    reads_ptr, place_ptr, weights_ptr, token, head, exists, inside, column, eps, FAN_OUT: tl.constexpr, HEADS: tl.constexpr,
    V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """u of one head of each token, and the norm's factor, 1 / sqrt(mean(x^2) + eps)."""
    x = tl.zeros((ROWS, COLUMNS), tl.float32)
    for f in tl.static_range(FAN_OUT):
        slot = token * FAN_OUT + f
        at = _slot_offsets(place_ptr, slot, head, exists, column, HEADS, V)
        x += _weigh(tl.load(reads_ptr + at, mask=inside, other=0.0).to(tl.float32), weights_ptr, slot, exists)
    factor = tl.rsqrt(tl.sum(x * x, 1) / V + eps)
    return x * factor[:, None], factor


@triton.jit
def _sigmoids(z):
    """Of z and of -z, without an exponential that could overflow."""
    fading = tl.exp(-tl.abs(z))
    total = 1.0 + fading
    return tl.where(z >= 0, 1.0, fading) / total, tl.where(z >= 0, fading, 1.0) / total


@triton.jit
def _forward_kernel(
    reads_ptr, place_ptr, weights_ptr, gate_ptr, norm_weight_ptr, valid_ptr, output_ptr, num_rows, eps,
    FAN_OUT: tl.constexpr, HEADS: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    exists = row < num_rows
    token, head = row // HEADS, row % HEADS
    real = _real_of(valid_ptr, token, exists)
    in_row = column < V
    inside = real[:, None] & in_row[None, :]
    normed, _ = _mix(
        reads_ptr, place_ptr, weights_ptr, token, head, exists, inside, column, eps, FAN_OUT, HEADS, V, ROWS, COLUMNS
    )
    at = row[:, None] * V + column[None, :]
    z = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    norm_weight = tl.load(norm_weight_ptr + column, mask=in_row, other=0.0).to(tl.float32)
    output = normed * norm_weight[None, :] * (z * _sigmoids(z)[0])
    output = tl.where(inside, output, 0.0).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + at, output, mask=exists[:, None] & in_row[None, :])


@triton.jit
def _backward_kernel(
    d_output_ptr, reads_ptr, place_ptr, weights_ptr, gate_ptr, norm_weight_ptr, valid_ptr, d_reads_ptr, d_weights_ptr,
    d_gate_ptr, d_norm_ptr, num_tokens, eps, FAN_OUT: tl.constexpr, HEADS: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    token = program * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    choice = tl.arange(0, CHOICES)
    exists = token < num_tokens
    real = _real_of(valid_ptr, token, exists)
    in_row = column < V
    inside = real[:, None] & in_row[None, :]
    written = exists[:, None] & in_row[None, :]
    norm_weight = tl.load(norm_weight_ptr + column, mask=in_row, other=0.0).to(tl.float32)
    d_norm = tl.zeros((COLUMNS,), tl.float32)
    d_weights = tl.zeros((ROWS, CHOICES), tl.float32)
    for head in range(0, HEADS):
        normed, factor = _mix(
            reads_ptr, place_ptr, weights_ptr, token, head, exists, inside, column, eps, FAN_OUT, HEADS, V, ROWS, COLUMNS
        )
        at = ((token * HEADS + head) * V)[:, None] + column[None, :]
        z = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
        d_output = tl.load(d_output_ptr + at, mask=inside, other=0.0).to(tl.float32)
        open_, shut = _sigmoids(z)
        gated = d_output * (z * open_)
        d_norm += tl.sum(tl.where(inside, gated * normed, 0.0), 0)
        d_normed = gated * norm_weight[None, :]
        along = tl.sum(d_normed * normed, 1) / V
        d_x = tl.where(inside, (d_normed - normed * along[:, None]) * factor[:, None], 0.0)
        d_gate = d_output * normed * norm_weight[None, :] * (open_ * (1.0 + z * shut))
        # Before anything is stored: the compiler then keeps the reads from above, where they are few, and loads nothing twice.
        if d_weights_ptr is not None:
            for f in tl.static_range(FAN_OUT):
                reads_at = _slot_offsets(place_ptr, token * FAN_OUT + f, head, exists, column, HEADS, V)
                read = tl.load(reads_ptr + reads_at, mask=inside, other=0.0).to(tl.float32)
                d_weights += tl.where(choice[None, :] == f, tl.sum(d_x * read, 1)[:, None], 0.0)
        for f in tl.static_range(FAN_OUT):
            slot = token * FAN_OUT + f
            reads_at = _slot_offsets(place_ptr, slot, head, exists, column, HEADS, V)
            d_read = tl.where(inside, _weigh(d_x, weights_ptr, slot, exists), 0.0)
            tl.store(d_reads_ptr + reads_at, d_read.to(d_reads_ptr.dtype.element_ty), mask=written)
        d_gate = tl.where(inside, d_gate, 0.0).to(d_gate_ptr.dtype.element_ty)
        tl.store(d_gate_ptr + at, d_gate, mask=written)
    if d_weights_ptr is not None:
        weights_at = token[:, None] * FAN_OUT + choice[None, :]
        tl.store(d_weights_ptr + weights_at, d_weights, mask=exists[:, None] & (choice < FAN_OUT)[None, :])
    tl.store(d_norm_ptr + program * V + column, d_norm, mask=in_row)


def _sizes(reads: Tensor, place: Tensor, num_tokens: int, launch: Launch) -> dict[str, int]:
    _, heads, value_dim = reads.shape
    columns = 1 << (value_dim - 1).bit_length()
    return {
        "FAN_OUT": place.numel() // num_tokens,
        "HEADS": heads,
        "V": value_dim,
        "ROWS": max(launch.tile // columns, 1),
        "COLUMNS": columns,
        "num_warps": launch.num_warps,
    }


def forward(
    reads: Tensor, place: Tensor, weights: Tensor | None, gate: Tensor, norm_weight: Tensor, valid: Tensor | None, eps: float
) -> Tensor:  # fmt: skip
    """Combine `reads` `[R, H, V]` under `gate` `[S, H * V]` to `[S, H * V]` in the dtype of the gate.

    `place` is `[R]` int64, `weights` `[S, F]` float32, `norm_weight` `[V]`, `valid` `[S]` bool. Everything is contiguous.
    """
    output = gate.new_empty(gate.shape)
    if output.numel() == 0:
        return output
    sizes = _sizes(reads, place, gate.shape[0], FORWARD)
    num_rows = gate.shape[0] * sizes["HEADS"]
    _forward_kernel[(cdiv(num_rows, sizes["ROWS"]),)](
        reads,
        place,
        weights,
        gate,
        norm_weight,
        None if valid is None else valid.view(torch.uint8),
        output,
        num_rows,
        eps,
        **sizes,
    )
    return output


def backward(
    d_output: Tensor, reads: Tensor, place: Tensor, weights: Tensor | None, gate: Tensor, norm_weight: Tensor,
    valid: Tensor | None, eps: float,
) -> Gradients:  # fmt: skip
    """The gradients, each in the shape and dtype of its tensor: those of a pad, and of its slots, are 0."""
    num_tokens = gate.shape[0]
    d_reads, d_gate = reads.new_empty(reads.shape), gate.new_empty(gate.shape)
    d_weights = None if weights is None else weights.new_empty(weights.shape)
    if gate.numel() == 0:
        return Gradients(d_reads, d_weights, d_gate, torch.zeros_like(norm_weight))
    sizes = _sizes(reads, place, num_tokens, BACKWARD)
    num_programs = cdiv(num_tokens, sizes["ROWS"])
    # A row of sums a program, and one sum of the rows.
    d_norm = norm_weight.new_empty(num_programs, sizes["V"], dtype=torch.float32)
    _backward_kernel[(num_programs,)](
        d_output,
        reads,
        place,
        weights,
        gate,
        norm_weight,
        None if valid is None else valid.view(torch.uint8),
        d_reads,
        d_weights,
        d_gate,
        d_norm,
        num_tokens,
        eps,
        **sizes,
        CHOICES=1 << (sizes["FAN_OUT"] - 1).bit_length(),
    )
    return Gradients(d_reads, d_weights, d_gate, d_norm.sum(0).to(norm_weight.dtype))
