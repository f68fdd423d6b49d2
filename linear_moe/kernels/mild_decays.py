"""Which walks have decays so mild that a chunk's pairs need no exponential each.

Between two tokens of a chunk, with s the sums of its log decays and m their value at the chunk's middle, a decay is

    e^(s_i - s_j) = e^(s_i - m) e^(m - s_j)

a factor of what is read by one and a factor of what is written by the other: the same numbers, as long as neither is out of
range.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linear_moe.kernels.blocks import HEAD_DECAY

LIMIT = tl.constexpr(40.0)
"""How far, to base 2, a chunk of a mild decay may fade. No factor is then above 2^40 or below 2^-40, of the 2^126 that float32
and bfloat16 have either way: two thirds of them are left for what is scaled. A token fades to 0.65 on average. Float16 has no
such range."""


@triton.jit
def strongest_decay(sums_ptr, rate, size, CHUNK: tl.constexpr, DECAY: tl.constexpr):
    """The least sum of log decays, to base 2, of a chunk of a walk; `sums` are a token's from its chunk's start."""
    if DECAY == HEAD_DECAY:
        least = rate * CHUNK
    else:
        CHUNKS: tl.constexpr = 64
        least_of_each = tl.zeros((CHUNKS,), sums_ptr.dtype.element_ty)
        for done in range(0, size, CHUNKS * CHUNK):
            begin = done + CHUNK * tl.arange(0, CHUNKS)
            total = tl.load(sums_ptr + tl.minimum(begin + CHUNK, size) - 1, mask=begin < size, other=0.0)
            least_of_each = tl.minimum(least_of_each, total)
        least = tl.min(least_of_each, 0)
    return least
