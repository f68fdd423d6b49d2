"""Logits to their cross entropies, and in place to their gradients: a row is read twice and written once.

PyTorch's steps (widen, logsumexp, subtract, exp, the label's part, narrow) take a dozen passes over what is, at a vocabulary of
32,000, the largest tensor of training. A program has a row: what it reads the second time is still in the caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import block_of
from linear_moe.kernels.launch import launch_kernel

BLOCK = 4096
"""Logits at a time: 16 a thread of 8 warps, two loads of 16 bytes each."""
NUM_WARPS = 8

LOWEST = tl.constexpr(-3e38)
"""Of no logit yet: -inf would be subtracted from itself."""


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    label_ptr,
    loss_ptr,
    stride,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
    WANT_GRADIENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    logits_ptr += row * stride
    column = tl.arange(0, BLOCK)
    # A maximum and a sum for each place of a block, joined at the end.
    highest = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, CHOICES, BLOCK):
        x = tl.load(logits_ptr + first + column, mask=first + column < CHOICES, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, x)
        total = total * tl.exp(highest - higher) + tl.exp(x - higher)
        highest = higher
    top = tl.max(highest, 0)
    normaliser = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
    own = tl.load(logits_ptr + label).to(tl.float32)
    tl.store(loss_ptr + row, normaliser - own)
    if WANT_GRADIENT:
        # Every thread has read the label's logit before one writes over it.
        tl.debug_barrier()
        for first in range(0, CHOICES, BLOCK):
            inside = first + column < CHOICES
            x = tl.load(logits_ptr + first + column, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.exp(x - normaliser) - tl.where(first + column == label, 1.0, 0.0)
            tl.store(logits_ptr + first + column, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


def cross_entropy_(logits: Tensor, labels: Tensor, want_gradient: bool) -> Tensor:
    """As `linear_moe.kernels.cross_entropy_operator.cross_entropy_`."""
    rows, choices = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        launch_kernel(
            _cross_entropy_kernel,
            rows,
            logits,
            labels,
            losses,
            logits.stride(0),
            CHOICES=choices,
            BLOCK=block_of(choices, BLOCK),
            WANT_GRADIENT=want_gradient,
            num_warps=NUM_WARPS,
        )
    return losses
