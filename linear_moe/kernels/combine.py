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

from linear_moe.kernels.blocks import cdiv, sigmoids, sum_rows
from linear_moe.kernels.launch import launch_kernel

LARGEST_VALUE_DIM = 256


class Launch(NamedTuple):
    """Launch parameters of both passes."""

    forward: int
    """Numbers of a token's H * V that a thread holds forward, where a token has so many."""
    backward: int
    """The same backward."""
    tokens: int
    """Tokens of a program backward, one after the other: they share one row of partial sums of the norm's gradient."""


# From a frozen table, measured on an H100 (torch 2.11, triton 3.6, bf16; ms at 32,768 tokens, F 3, H 4, V 256): forward 0.115,
# with 4 numbers 0.124, 16 0.118; backward 0.279, with 8 numbers 0.309, 4 0.326; then with 4 tokens 0.314, 16 0.323. The floors
# at 3 TB/s are 0.11 and 0.20.
LAUNCH = Launch(forward=8, backward=16, tokens=8)
MOST_WARPS = 16


class Gradients(NamedTuple):
    """Of the loss, by what was combined."""

    reads: Tensor
    weights: Tensor | None
    gate: Tensor
    norm_weight: Tensor


@triton.jit
def _real_heads(valid_ptr, token, HEADS: tl.constexpr):
    """How many heads of a token are read: none of a pad's."""
    heads = HEADS
    if valid_ptr is not None:
        heads = tl.where(tl.load(valid_ptr + token) != 0, HEADS, 0)
    return heads


@triton.jit
def _weight_of(weights_ptr, slot):
    """Of a slot: 1 if there are none."""
    weight = 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + slot)
    return weight


@triton.jit
def _normed(
    reads_ptr, place_ptr, weights_ptr, first_slot, at, inside, eps, SLOTS: tl.constexpr, SIZE: tl.constexpr, V: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The u of a token's heads, and the norm's factor, 1 / sqrt(mean(x^2) + eps)."""
    x = tl.zeros((HEADS_BLOCK, COLUMNS), tl.float32)
    for f in tl.static_range(SLOTS):
        read = tl.load(reads_ptr + tl.load(place_ptr + first_slot + f) * SIZE + at, mask=inside, other=0.0)
        x += _weight_of(weights_ptr, first_slot + f) * read.to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, 1) / V + eps)
    return x * factor[:, None], factor


@triton.jit
def _forward_kernel(
    reads_ptr, place_ptr, weights_ptr, gate_ptr, norm_weight_ptr, valid_ptr, output_ptr, eps, SLOTS: tl.constexpr,
    HEADS: tl.constexpr, V: tl.constexpr, HEADS_BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = HEADS * V
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS_BLOCK), tl.arange(0, COLUMNS)
    in_row = column < V
    at = head[:, None] * V + column[None, :]
    inside = (head < _real_heads(valid_ptr, token, HEADS))[:, None] & in_row[None, :]
    normed, _ = _normed(
        reads_ptr, place_ptr, weights_ptr, token * SLOTS, at, inside, eps, SLOTS, SIZE, V, HEADS_BLOCK, COLUMNS
    )
    z = tl.load(gate_ptr + token * SIZE + at, mask=inside, other=0.0).to(tl.float32)
    norm_weight = tl.load(norm_weight_ptr + column, mask=in_row, other=0.0).to(tl.float32)
    output = tl.where(inside, normed * norm_weight[None, :] * (z * sigmoids(z)[0]), 0.0)
    written = (head < HEADS)[:, None] & in_row[None, :]
    tl.store(output_ptr + token * SIZE + at, output.to(output_ptr.dtype.element_ty), mask=written)


@triton.jit
def _backward_kernel(
    d_output_ptr, reads_ptr, place_ptr, weights_ptr, gate_ptr, norm_weight_ptr, valid_ptr, d_reads_ptr, d_weights_ptr,
    d_gate_ptr, d_norm_ptr, num_tokens, eps, TOKENS: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr,
    V: tl.constexpr, SLOTS_BLOCK: tl.constexpr, HEADS_BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = HEADS * V
    program = tl.program_id(0).to(tl.int64)
    first_token = program * TOKENS
    slot, head, column = tl.arange(0, SLOTS_BLOCK), tl.arange(0, HEADS_BLOCK), tl.arange(0, COLUMNS)
    in_row = column < V
    at = head[:, None] * V + column[None, :]
    written = (head < HEADS)[:, None] & in_row[None, :]
    norm_weight = tl.load(norm_weight_ptr + column, mask=in_row, other=0.0).to(tl.float32)
    d_norm = tl.zeros((HEADS_BLOCK, COLUMNS), tl.float32)
    for step in range(tl.minimum(num_tokens - first_token, TOKENS).to(tl.int32)):
        token = first_token + step
        first_slot = token * SLOTS
        inside = (head < _real_heads(valid_ptr, token, HEADS))[:, None] & in_row[None, :]
        normed, factor = _normed(
            reads_ptr, place_ptr, weights_ptr, first_slot, at, inside, eps, SLOTS, SIZE, V, HEADS_BLOCK, COLUMNS
        )
        z = tl.load(gate_ptr + token * SIZE + at, mask=inside, other=0.0).to(tl.float32)
        d_output = tl.load(d_output_ptr + token * SIZE + at, mask=inside, other=0.0).to(tl.float32)
        up, down = sigmoids(z)
        d_gate = tl.where(inside, d_output * normed * norm_weight[None, :] * (up * (1.0 + z * down)), 0.0)
        tl.store(d_gate_ptr + token * SIZE + at, d_gate.to(d_gate_ptr.dtype.element_ty), mask=written)
        gated = d_output * (z * up)
        d_norm += tl.where(inside, gated * normed, 0.0)
        d_normed = gated * norm_weight[None, :]
        along = tl.sum(d_normed * normed, 1) / V
        d_x = tl.where(inside, (d_normed - normed * along[:, None]) * factor[:, None], 0.0)
        # The reads a second time, from the cache. The gradient stored in between keeps the compiler from holding them in
        # registers instead: at F = 3 and 8 numbers a thread that is 94 registers against 145.
        if d_weights_ptr is not None:
            d_weights = tl.zeros((SLOTS_BLOCK,), tl.float32)
            for f in tl.static_range(SLOTS):
                place = tl.load(place_ptr + first_slot + f)
                read = tl.load(reads_ptr + place * SIZE + at, mask=inside, other=0.0).to(tl.float32)
                d_weights = tl.where(slot == f, tl.sum(tl.sum(d_x * read, 1), 0), d_weights)
            tl.store(d_weights_ptr + first_slot + slot, d_weights, mask=slot < SLOTS)
        for f in tl.static_range(SLOTS):
            place = tl.load(place_ptr + first_slot + f)
            d_read = tl.where(inside, _weight_of(weights_ptr, first_slot + f) * d_x, 0.0)
            tl.store(d_reads_ptr + place * SIZE + at, d_read.to(d_reads_ptr.dtype.element_ty), mask=written)
    tl.store(d_norm_ptr + program * V + column, tl.sum(d_norm, 0), mask=in_row)


def _sizes(reads: Tensor, num_tokens: int, numbers: int) -> dict[str, int]:
    slots, heads, value_dim = reads.shape
    heads_block, columns = 1 << (heads - 1).bit_length(), 1 << (value_dim - 1).bit_length()
    return {
        "SLOTS": slots // num_tokens,
        "HEADS": heads,
        "V": value_dim,
        "HEADS_BLOCK": heads_block,
        "COLUMNS": columns,
        "num_warps": min(max(heads_block * columns // (32 * numbers), 1), MOST_WARPS),
    }


def forward(
    reads: Tensor, place: Tensor, weights: Tensor | None, gate: Tensor, norm_weight: Tensor, valid: Tensor | None, eps: float
) -> Tensor:  # fmt: skip
    """Combine `reads` `[R, H, V]` under `gate` `[S, H * V]` to `[S, H * V]` in the dtype of the gate.

    `place` is `[R]` int64, `weights` `[S, F]` float32, `norm_weight` `[V]`, `valid` `[S]` bool. Everything is contiguous.
    """
    output = gate.new_empty(gate.shape)
    if output.numel():
        launch_kernel(
            _forward_kernel,
            gate.shape[0],
            reads,
            place,
            weights,
            gate,
            norm_weight,
            None if valid is None else valid.view(torch.uint8),
            output,
            eps,
            **_sizes(reads, gate.shape[0], LAUNCH.forward),
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
    num_programs = cdiv(num_tokens, LAUNCH.tokens)
    d_norm = norm_weight.new_empty(num_programs, norm_weight.shape[0], dtype=torch.float32)
    launch_kernel(
        _backward_kernel,
        num_programs,
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
        TOKENS=LAUNCH.tokens,
        SLOTS_BLOCK=1 << (reads.shape[0] // num_tokens - 1).bit_length(),
        **_sizes(reads, num_tokens, LAUNCH.backward),
    )
    return Gradients(d_reads, d_weights, d_gate, sum_rows(d_norm, norm_weight.dtype))
