"""The join of transitions: from what each piece does to a state, the state at every border.

A piece of a recurrence without erase takes S to Diag(exp(total)) S + increment. Joining pieces in order, forwards or backwards
in time, gives the state that each starts from and the last one; the same join serves pieces of one GPU's sequence, chunks of
a prefill, and parts of a sequence on several GPUs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.splits import Splits

JOIN_BLOCK = 1024


@triton.jit
def _join_kernel(
    increments_ptr,
    totals_ptr,
    initial_ptr,
    starts_ptr,
    final_ptr,
    first_ptr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    SIZE: tl.constexpr = K * V
    NUM_BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    block = program % NUM_BLOCKS
    head = (program // NUM_BLOCKS) % HEADS
    segment = (program // (NUM_BLOCKS * HEADS)).to(tl.int64)
    numbers = block * BLOCK + tl.arange(0, BLOCK)
    inside = numbers < SIZE
    at_segment = (segment * HEADS + head) * SIZE + numbers
    if initial_ptr is not None:
        state = tl.load(initial_ptr + at_segment, mask=inside, other=0.0)
    else:
        state = tl.zeros((BLOCK,), tl.float32)
    first = tl.load(first_ptr + segment)
    count = (tl.load(first_ptr + segment + 1) - first).to(tl.int32)
    for step in range(count):
        piece = first + (count - 1 - step if REVERSE else step)
        at = (piece * HEADS + head) * SIZE + numbers
        tl.store(starts_ptr + at, state, mask=inside)
        if PER_CHANNEL:
            total = tl.load(totals_ptr + (piece * HEADS + head) * K + numbers // V, mask=inside, other=0.0)
        else:
            total = tl.load(totals_ptr + piece * HEADS + head)
        state = tl.exp(total) * state + tl.load(increments_ptr + at, mask=inside, other=0.0)
    if final_ptr is not None:
        tl.store(final_ptr + at_segment, state, mask=inside)


def join(
    increments: Tensor, totals: Tensor, initial_state: Tensor | None, splits: Splits, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Join the pieces' transitions of every segment in order.

    Args:
        increments: `[P, H, K, V]` float32: each piece's final state from a start of zeros.
        totals: `[P, H]` or, with a decay a key channel, `[P, H, K]` float32: the sum of each piece's log decays.
        initial_state: `[N, H, K, V]` float32, or None for zeros: of a segment's first piece, or its last in `reverse`.
        splits: the pieces of the segments.
        reverse: walk the pieces from a segment's last to its first.

    Returns:
        The state each piece starts from `[P, H, K, V]` (0 for a piece of no segment), and the one after each segment's last
        `[N, H, K, V]`, float32.
    """
    assert splits.first is not None
    num_segments = splits.first.numel() - 1
    _, heads, K, V = increments.shape
    starts = torch.zeros_like(increments)
    final = torch.empty(num_segments, heads, K, V, dtype=torch.float32, device=increments.device)
    _join_kernel[(num_segments * heads * triton.cdiv(K * V, JOIN_BLOCK),)](
        increments,
        totals,
        initial_state,
        starts,
        final,
        splits.first,
        HEADS=heads,
        K=K,
        V=V,
        PER_CHANNEL=totals.dim() == 3,
        BLOCK=JOIN_BLOCK,
        REVERSE=reverse,
    )
    return starts, final


def join_affine(
    increments: Tensor, transitions: Tensor, initial_state: Tensor | None, splits: Splits, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """`join` for a recurrence with erase, whose pieces take S to transition @ S + increment.

    Args:
        increments: `[P, H, K, V]` float32.
        transitions: `[P, H, K, K]` float32.
        initial_state: `[N, H, K, V]` float32, or None for zeros.
        splits: the pieces of the segments.
        reverse: walk the pieces from a segment's last to its first.

    Returns:
        As `join`.
    """
    assert splits.first is not None
    first, after = splits.first[:-1], splits.first[1:]
    if initial_state is None:
        state = increments.new_zeros(first.numel(), *increments.shape[1:])
    else:
        state = initial_state
    # One row more, for segments that have no such piece.
    starts = increments.new_zeros(splits.num_pieces + 1, *increments.shape[1:])
    for step in range(splits.most):
        piece = after - 1 - step if reverse else first + step
        exists = (piece >= first) & (piece < after)
        starts.index_copy_(0, torch.where(exists, piece, splits.num_pieces), state)
        piece = torch.where(exists, piece, 0)
        new = torch.matmul(transitions[piece], state) + increments[piece]
        state = torch.where(exists[:, None, None, None], new, state)
    return starts[:-1], state
