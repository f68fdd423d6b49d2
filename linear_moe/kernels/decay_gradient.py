"""The gradient of scalar decays, from sums of products that the other gradients' walks leave behind.

With rows and columns of the matrix of pairs (j wrote, t read, j < t), d log a_t is what crosses t: the pairs written before t
and read at t or later. So it is <S_0, dS_0> plus, before t, the sum of what each token wrote for later ones less what it read
from earlier ones. Summed from the start it never begins with a large number, as it would from the end with <dS_T, S_T>:
S_T holds what was written last, undecayed, while dS_0 has been through every decay. A token's own pair crosses nothing
and is in neither sum: with a strong decay it is nearly all of them, and their difference would be rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import cdiv, load_start, num_processors, piece_of, state_offsets
from linear_moe.kernels.join import Starts
from linear_moe.kernels.launch import launch_kernel

ROWS_BLOCK = 1024
STATE_BLOCK = 4096
MOST_HEADS = 4
"""Of a program, where there are programs enough: what it writes of a token is then four numbers side by side."""


@triton.jit
def _decay_gradient_kernel(
    read_ptr,
    written_ptr,
    initial_ptr,
    joined_ptr,
    owner_ptr,
    first_ptr,
    ends_ptr,
    gradient_ptr,
    borders_ptr,
    borders_stride,
    num_tokens,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    READ_TILES: tl.constexpr,
    WRITTEN_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    STATE: tl.constexpr,
    GROUP: tl.constexpr,
):
    GROUPS: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    program = tl.program_id(0)
    each = tl.arange(0, GROUP)
    heads = (program % GROUPS).to(tl.int64) * GROUP + each
    piece = (program // GROUPS).to(tl.int64)
    start, size = piece_of(borders_ptr, borders_stride, piece)
    # In float64: over a long piece the sums are far larger than what they differ by.
    carry = tl.zeros((GROUP,), tl.float64)
    if ends_ptr is not None:
        # As states of one row.
        one = tl.arange(0, 1)
        for place in tl.static_range(GROUP):
            head = tl.minimum((program % GROUPS) * GROUP + place, HEADS - 1)
            for number in range(0, SIZE, STATE):
                numbers = number + tl.arange(0, STATE)
                state = load_start(
                    initial_ptr, joined_ptr, owner_ptr, first_ptr, piece, head, HEADS, one, numbers, 1, SIZE, False, False
                )  # fmt: skip
                at = state_offsets(piece, head, HEADS, one, numbers, 1, SIZE, False)
                end = tl.load(ends_ptr + at, mask=(numbers < SIZE)[None, :], other=0.0)
                at_start = tl.sum(tl.sum(state.to(tl.float64) * end, 1), 0)
                carry += tl.where(each == place, at_start, 0.0)
    for step in range(tl.cdiv(size, BLOCK)):
        row = step * BLOCK + tl.arange(0, BLOCK)
        valid = (row < size)[:, None] & (heads < HEADS)[None, :]
        token = (start + row)[:, None]
        amount = tl.zeros((BLOCK, GROUP), tl.float64)
        for tile in tl.static_range(WRITTEN_TILES):
            amount += tl.load(written_ptr + (tile * HEADS + heads)[None, :] * num_tokens + token, mask=valid, other=0.0)
        for tile in tl.static_range(READ_TILES):
            amount -= tl.load(read_ptr + (tile * HEADS + heads)[None, :] * num_tokens + token, mask=valid, other=0.0)
        before = carry[None, :] + tl.cumsum(amount, 0) - amount
        tl.store(gradient_ptr + token * HEADS + heads[None, :], before.to(tl.float32), mask=valid)
        carry += tl.sum(amount, 0)


def new_sums(tiles: int, heads: int, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[tiles, H, S]`, what walks leave behind for a decay's gradient: float32, and of inputs in float32 float64. The gradient
    is a sum over all tokens of their differences, and of what each is rounded.
    """
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    return torch.empty(tiles, heads, num_tokens, dtype=wide, device=device)


def _heads_together(num_pieces: int, heads: int, device: torch.device) -> int:
    """Heads of a program."""
    wanted = num_processors(device) // 2
    return next((g for g in (MOST_HEADS, 2) if g <= heads and num_pieces * cdiv(heads, g) >= wanted), 1)


def decay_gradient(
    read: Tensor, written: Tensor, starts: Starts, ends: Tensor | None, borders: Tensor, *, dense: bool
) -> Tensor:
    """The gradient of the log decays `[S, H]` float32; 0 for tokens in no piece.

    Args:
        read: `new_sums`, to be summed over tiles: <q, dq> without a token's own pair, and what an erase reads.
        written: the same of what a token wrote, <v, dv> or <k, dk>.
        starts: S_0, the state that each piece starts from.
        ends: `[P, H, K, V]` float32, dS_0, its gradient, or None where no piece starts from any.
        borders: `[P, 2]` int64.
        dense: whether the pieces cover every token.
    """
    _, heads, num_tokens = read.shape
    gradient = read.new_empty(num_tokens, heads) if dense else read.new_zeros(num_tokens, heads)
    group = _heads_together(borders.shape[0], heads, read.device)
    launch_kernel(
        _decay_gradient_kernel,
        borders.shape[0] * cdiv(heads, group),
        read,
        written,
        *starts.arguments(),
        ends,
        gradient,
        borders,
        borders.stride(0),
        num_tokens,
        HEADS=heads,
        SIZE=1 if ends is None else ends.shape[2] * ends.shape[3],
        READ_TILES=read.shape[0],
        WRITTEN_TILES=written.shape[0],
        BLOCK=ROWS_BLOCK,
        STATE=STATE_BLOCK,
        GROUP=group,
        num_warps=8 if group > 1 else 4,
    )
    return gradient
