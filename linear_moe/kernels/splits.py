"""Ragged segments, and cutting them into splits so that a few long ones fill a GPU as well as many short ones.

Where to cut depends on static sizes only, never on the data. Each split is scanned by itself from an empty state; the states
at the splits' borders follow by joining those transitions in order (`linear_moe.kernels.join`); then every split is scanned
from its own.
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
    owner: Tensor
    """`[P]` int64: the segment of each piece; the last one's for pieces past the last."""
    most: int
    """A bound on the pieces of a segment."""

    @property
    def num_pieces(self) -> int:
        """P, a bound that sizes alone decide."""
        return self.borders.shape[0]

    @property
    def cut(self) -> bool:
        """Whether a segment may have several pieces."""
        return self.most > 1


class Ragged(NamedTuple):
    """Segments of flattened tokens."""

    cu_seqlens: Tensor
    """`[N + 1]` int64 on the device; tokens past the last border are in no segment."""
    max_length: int
    """A bound on the tokens of a segment."""
    dense: bool
    """Whether the segments cover every token."""

    @property
    def num_segments(self) -> int:
        """N"""
        return self.cu_seqlens.numel() - 1

    def pieces(self, num_tokens: int, length: int | None) -> Splits:
        """Segments cut into pieces of `length` of the `num_tokens` tokens, or left whole."""
        if length is None:
            return whole(self.cu_seqlens)
        return cut(self.cu_seqlens, num_tokens, length, self.max_length)


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
    first = torch.arange(cu_seqlens.numel(), device=cu_seqlens.device)
    return Splits(borders, first, first[:-1], most=1)


def num_pieces(num_tokens: int, num_segments: int, length: int) -> int:
    """A bound on the pieces of `length` tokens, from sizes alone: of each segment, one piece at most is not full."""
    return num_tokens // length + num_segments


def cut(cu_seqlens: Tensor, num_tokens: int, length: int, max_length: int) -> Splits:
    """Segments cut into pieces of `length` tokens and a rest."""
    num_segments = cu_seqlens.numel() - 1
    pieces = ((cu_seqlens.diff() + length - 1) // length).clamp_min(1)
    first = F.pad(pieces.cumsum(0), (1, 0))
    index = torch.arange(num_pieces(num_tokens, num_segments, length), device=cu_seqlens.device)
    owner = torch.searchsorted(first[1:], index, right=True)
    inside = owner < num_segments
    owner = owner.clamp_max(num_segments - 1)
    start = cu_seqlens[owner] + (index - first[owner]) * length
    stop = torch.minimum(start + length, cu_seqlens[owner + 1])
    borders = torch.stack((torch.where(inside, start, 0), torch.where(inside, stop, 0)), 1)
    return Splits(borders, first, owner, most=max(-(-max_length // length), 1))
