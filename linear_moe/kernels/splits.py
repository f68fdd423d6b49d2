"""Cutting segments into splits, so that a few long ones fill a GPU as well as many short ones.

Where to cut depends on static sizes only, never on the data. Each split is scanned by itself from an empty state; the states
at the splits' borders follow by joining those transitions in order (`linear_moe.kernels.scalar_scan`); then every split is
scanned from its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WAVES = 2
"""Programs wanted a multiprocessor."""
LEAST_GAIN = 3.0
"""Splitting reads keys and values twice and takes a dozen more launches: it must shorten the longest walk by more than this.
At B8 T4096 H4 K = V = 256 on an H200 walks half as long took three times the time."""


class Splits(NamedTuple):
    """P pieces of segments. A segment has at least one, so that its final state is made even if it is empty."""

    borders: Tensor
    """`[P, 2]` int64: first token of each piece, and one past its last."""
    first: Tensor
    """`[N + 1]` int64: the first piece of each segment; pieces past the last hold nothing."""

    @property
    def num_pieces(self) -> int:
        """P, a bound that sizes alone decide."""
        return self.borders.shape[0]


def split_length(num_tokens: int, max_length: int, walks_per_token: int, num_processors: int, chunk: int) -> int | None:
    """Tokens of a piece, or None where cutting doesn't pay.

    Args:
        num_tokens: tokens of the input.
        max_length: a bound on the tokens of a segment.
        walks_per_token: programs that walk each token: heads times tiles of value channels.
        num_processors: of the GPU.
        chunk: tokens of a chunk, of which a piece is a multiple.
    """
    share = -(-num_tokens * walks_per_token // (WAVES * num_processors))
    length = max(-(-share // chunk), 1) * chunk
    return length if length * LEAST_GAIN < max_length else None


def whole(cu_seqlens: Tensor) -> Splits:
    """Every segment one piece."""
    borders = torch.stack((cu_seqlens[:-1], cu_seqlens[1:]), 1)
    return Splits(borders, torch.arange(cu_seqlens.numel(), device=cu_seqlens.device))


def cut(cu_seqlens: Tensor, num_tokens: int, length: int) -> Splits:
    """Segments cut into pieces of `length` tokens and a rest."""
    num_segments = cu_seqlens.numel() - 1
    pieces = ((cu_seqlens.diff() + length - 1) // length).clamp_min(1)
    first = F.pad(pieces.cumsum(0), (1, 0))
    index = torch.arange(num_tokens // length + num_segments, device=cu_seqlens.device)
    owner = torch.searchsorted(first[1:], index, right=True)
    inside = owner < num_segments
    owner = owner.clamp_max(num_segments - 1)
    start = cu_seqlens[owner] + (index - first[owner]) * length
    stop = torch.minimum(start + length, cu_seqlens[owner + 1])
    borders = torch.stack((torch.where(inside, start, 0), torch.where(inside, stop, 0)), 1)
    return Splits(borders, first)
