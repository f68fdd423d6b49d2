"""Tiles that the hardware's tensor descriptors move, from Hopper on: no thread makes an address, or has registers for it."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor


def describable(*tensors: Tensor) -> bool:
    """Whether `described_rows` can be of these: rows and addresses are of whole 16 bytes, and the GPU has descriptors."""
    return _has_descriptors(tensors[0].device) and all(
        x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0 for x in tensors
    )


@functools.cache
def _has_descriptors(device: torch.device) -> bool:
    # The interpreter has them.
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def described_rows(
    ptr, start, size, head, HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A descriptor of tiles `[ROWS, COLUMNS]` of one head of a piece of a tensor `[S, HEADS, WIDTH]`.

    Outside the piece it loads 0 and stores nothing.
    """
    # Not even of an empty piece is a descriptor's size 0.
    return tl.make_tensor_descriptor(
        ptr + (start * HEADS + head) * WIDTH, shape=[tl.maximum(size, 1), WIDTH], strides=[HEADS * WIDTH, 1],
        block_shape=[ROWS, COLUMNS],
    )  # fmt: skip


@triton.jit
def described_states(ptr, count, K: tl.constexpr, V: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr):
    """A descriptor of tiles `[1, KEYS, VALUES]` of `count` states `[K, V]`.

    Outside a state it stores nothing.
    """
    return tl.make_tensor_descriptor(ptr, shape=[count, K, V], strides=[K * V, V, 1], block_shape=[1, KEYS, VALUES])
