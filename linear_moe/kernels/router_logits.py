"""A router's logits, x W^T in float32, each summed in an order that depends on the width alone.

A library's matmul may split a row differently when there are more or fewer rows beside it, and a bit's difference is enough to
send a token to another memory in decoding than in training. Here a row's products are added up in blocks of one width, whatever
stands in the other rows of its tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import block_of, cdiv
from linear_moe.kernels.launch import launch_kernel
from linear_moe.kernels.operator import operator

ROWS = 32
WIDTH = 64


@triton.jit
def _logits_kernel(
    x_ptr,
    weight_ptr,
    logits_ptr,
    num_tokens,
    CHOICES: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    choices = tl.arange(0, BLOCK)
    logits = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, SIZE, WIDTH):
        channels = first + tl.arange(0, WIDTH)
        inside = channels < SIZE
        x = tl.load(
            x_ptr + rows[:, None] * SIZE + channels[None, :],
            mask=(rows < num_tokens)[:, None] & inside[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + choices[None, :] * SIZE + channels[:, None],
            mask=(choices < CHOICES)[None, :] & inside[:, None],
            other=0.0,
        )
        logits = tl.dot(x.to(tl.float32), weight.to(tl.float32), acc=logits, input_precision="ieee")
    at = rows[:, None] * CHOICES + choices[None, :]
    tl.store(logits_ptr + at, logits, mask=(rows < num_tokens)[:, None] & (choices < CHOICES)[None, :])


@operator("router_logits")
def _logits(x: Tensor, weight: Tensor) -> Tensor:
    num_tokens, size = x.shape
    choices = weight.shape[0]
    logits = torch.empty(num_tokens, choices, dtype=torch.float32, device=x.device)
    if logits.numel():
        with torch.cuda.device_of(x):
            launch_kernel(
                _logits_kernel, cdiv(num_tokens, ROWS), x, weight, logits, num_tokens, CHOICES=choices, SIZE=size, ROWS=ROWS,
                WIDTH=WIDTH, BLOCK=block_of(choices), num_warps=4, num_stages=2,
            )  # fmt: skip
    return logits


@torch.library.register_fake("linear_moe::router_logits")
def _(x, weight):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, d_logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    d_x = (d_logits @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
    d_weight = (d_logits.t() @ x.float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
    return d_x, d_weight


torch.library.register_autograd("linear_moe::router_logits", _gradients, setup_context=_keep)


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """`x` `[S, D]` times `weight` `[M, D]`: `[S, M]` float32.

    Args:
        x: float32, bfloat16 or float16.
        weight: float32, bfloat16 or float16.
    """
    logits: Tensor = _logits(x.contiguous(), weight.contiguous())
    return logits
