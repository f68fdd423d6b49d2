"""Ragged segments, and cutting them into splits so that a few long ones fill a GPU as well as many short ones.

How long a split is depends on static sizes only. Each split is scanned by itself from an empty state; the states at the splits'
borders follow by joining those transitions in order (`linear_moe.kernels.join`); then every split is scanned from its own. Only
segments longer than a split pay for it; and where sizes alone don't say how long the longest is, the device looks before it
cuts any: it is the same for the same segments, on either pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.blocks import block_of, cdiv
from linear_moe.kernels.launch import launch_kernel
from linear_moe.static_tensors import static

SEGMENTS_BLOCK = 1024
PIECES_BLOCK = 256
MOST_ORDERED = 256
"""Segments. Of more, the last one walked is a small part of what a multiprocessor walks."""
WAVES = 2
"""Programs wanted a multiprocessor."""
LEAST_GAIN = 3.0
"""Splitting walks most of a long segment twice: it must shorten the longest walk by more than this."""


class Walked(NamedTuple):
    """Pieces that a walk goes through."""

    borders: Tensor
    """`[P, 2]` int64, of all pieces; those that are emptied take no time."""
    order: Tensor | None
    """int64: which, one after another; None: all."""

    @property
    def num_pieces(self) -> int:
        """How many they are."""
        return self.borders.shape[0] if self.order is None else self.order.numel()

    def arguments(self) -> tuple[Tensor, int, Tensor | None]:
        """Of a kernel: the borders, from one to the next of them, and the order."""
        return self.borders, self.borders.stride(0), self.order


class Splits(NamedTuple):
    """P pieces of segments. A segment has at least one, so that its final state is made even if it is empty."""

    borders: Tensor
    """`[P, 2]` int64: first token of each piece, and one past its last; rows may overlap in memory."""
    first: Tensor | None
    """`[N + 1]` int64: the first piece of each segment; pieces past the last hold nothing. None: every segment is one piece."""
    owner: Tensor | None
    """`[P]` int64: the segment of each piece; the last one's for pieces past the last. None as above."""
    leading: Tensor | None
    """`[L]` int64: all pieces but the last of each segment, for no start depends on what that does; and, up to a bound that
    sizes alone decide, one that is empty. None as above, and of pieces that others are made up of."""
    trailing: Tensor | None
    """`[L]` int64: all but the first of each segment: the same backwards."""
    several: Tensor | None
    """`borders` with the pieces of segments that have just one emptied. None as above."""
    most: int
    """A bound on the pieces of a segment."""
    order: Tensor | None = None
    """`[P]` int64: the pieces as they should be walked, the longest of uncut segments first. None: one after another."""
    begins: Tensor | None = None
    """`[P]` int64: of smaller pieces that make these up (`cut_twice`), the one that each begins with; of empty ones, any."""

    @property
    def num_pieces(self) -> int:
        """P, a bound that sizes alone decide."""
        return self.borders.shape[0]

    @property
    def cut(self) -> bool:
        """Whether a segment may have several pieces."""
        return self.most > 1

    @property
    def all(self) -> Walked:
        """Every piece."""
        return Walked(self.borders, self.order)

    @property
    def of_cut_segments(self) -> Walked:
        """Those of segments that have several."""
        assert self.several is not None
        return Walked(self.several, self.order)

    def handing_on(self, *, reverse: bool = False) -> Walked:
        """Those that another starts from, forwards or backwards in time."""
        order = self.trailing if reverse else self.leading
        assert order is not None
        return Walked(self.borders, order)

    def ends(self, states: Tensor, *, reverse: bool = False) -> Tensor:
        """Of the states `[P, ...]` after each piece, those after each segment's last, or in reverse its first: `[N, ...]`."""
        if self.first is None:
            return states
        return states[self.first[:-1] if reverse else self.first[1:] - 1]


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

    def uniform(self, num_tokens: int) -> bool:
        """Whether every segment has `max_length` tokens, as a batch has: then sizes alone say where pieces lie."""
        return self.dense and self.num_segments * self.max_length == num_tokens

    def grain(self, num_tokens: int) -> int:
        """The power of 2, from 32 to 256, that sizes alone say every segment is a multiple of; 1 if there is none."""
        if not self.uniform(num_tokens) or self.max_length == 0:
            return 1
        grain = min(self.max_length & -self.max_length, 256)
        return grain if grain >= 32 else 1

    def in_full(self, num_tokens: int, length: int) -> bool:
        """Whether every segment is known to be parts of `length`, a power of 2, and no shorter one."""
        return self.grain(num_tokens) % length == 0

    def pieces(self, num_tokens: int, length: int | None) -> Splits:
        """Segments cut into pieces of `length` of the `num_tokens` tokens, or left whole."""
        if length is None:
            return whole(self.cu_seqlens)
        if not self.uniform(num_tokens):
            return cut(self.cu_seqlens, num_tokens, length, self.max_length)
        return _uniform_pieces(self.num_segments, self.max_length, length, self.cu_seqlens.device)

    def splits(self, num_tokens: int, length: int | None) -> Splits:
        """`pieces`, but where cutting the longest segment would not pay, which the device sees, every segment is one."""
        if length is None or self.uniform(num_tokens):
            return self.pieces(num_tokens, length)
        return cut(self.cu_seqlens, num_tokens, length, self.max_length, whole=int(LEAST_GAIN * length))

    def cut_twice(self, num_tokens: int, piece: int, split: int | None) -> tuple[Splits, Splits]:
        """The `pieces`, and the `splits` that are made up of them: in as few launches as either takes."""
        if split is None:
            pieces = self.pieces(num_tokens, piece)
            assert pieces.first is not None
            return pieces, whole(self.cu_seqlens)._replace(begins=pieces.first[:-1])
        if self.uniform(num_tokens):
            device = self.cu_seqlens.device
            begins = _uniform_begins(self.num_segments, self.max_length, split, piece, device)
            return self.pieces(num_tokens, piece), self.pieces(num_tokens, split)._replace(begins=begins)
        pieces, splits = _cut(
            self.cu_seqlens, num_tokens, self.max_length, Cut(piece), Cut(split, whole=int(LEAST_GAIN * split))
        )
        return pieces, splits

    def num_pieces(self, num_tokens: int, length: int) -> int:
        """P of `pieces`."""
        if self.uniform(num_tokens):
            return self.num_segments * max(cdiv(self.max_length, length), 1)
        return num_pieces(num_tokens, self.num_segments, length)


def split_length(num_tokens: int, max_length: int, walks_per_token: int, num_processors: int, chunk: int) -> int | None:
    """Tokens of a piece, or None where cutting doesn't pay.

    Args:
        num_tokens: tokens of the input.
        max_length: a bound on the tokens of a segment.
        walks_per_token: programs that walk each token: heads times tiles of value channels.
        num_processors: of the GPU.
        chunk: tokens of a chunk, of which a piece is a multiple.
    """
    # The longest segment's share of the programs, rounded down: a piece more would be walked after all others.
    share = WAVES * num_processors * max_length // max(num_tokens * walks_per_token, 1)
    length = max(cdiv(cdiv(max_length, max(share, 1)), chunk), 1) * chunk
    return length if length * LEAST_GAIN < max_length else None


def whole(cu_seqlens: Tensor) -> Splits:
    """Every segment one piece."""
    return Splits(cu_seqlens.unfold(0, 2, 1), None, None, None, None, None, 1)


@static
def _uniform_pieces(num_segments: int, segment_length: int, length: int, device: torch.device) -> Splits:
    """Segments of one length cut into pieces."""
    each = max(cdiv(segment_length, length), 1)
    piece = torch.arange(num_segments * each, device=device)
    owner, place = piece // each, piece % each
    start = owner * segment_length + place * length
    borders = torch.stack((start, torch.minimum(start + length, (owner + 1) * segment_length)), -1)
    leading, trailing = (piece[which] for which in (place + 1 < each, place > 0))
    several = borders if each > 1 else torch.zeros_like(borders)
    first = torch.arange(num_segments + 1, device=device) * each
    return Splits(borders, first, owner, leading, trailing, several, each)


@static
def _uniform_begins(num_segments: int, segment_length: int, length: int, smaller: int, device: torch.device) -> Tensor:
    """With which of the pieces of `smaller` tokens those of `length`, a multiple, begin, in segments of one length."""
    each, pieces = (max(cdiv(segment_length, size), 1) for size in (length, smaller))
    piece = torch.arange(num_segments * each, device=device)
    return piece // each * pieces + piece % each * (length // smaller)


def num_pieces(num_tokens: int, num_segments: int, length: int) -> int:
    """A bound on the pieces of `length` tokens, from sizes alone: one of each segment may not be full, and one is empty."""
    return num_tokens // length + num_segments + 1


@triton.jit
def _first_kernel(
    cu_seqlens_ptr,
    first_ptr,
    length_ptr,
    order_ptr,
    num_segments,
    length,
    whole,
    next_length,
    next_whole,
    BLOCK: tl.constexpr,
    ORDERED: tl.constexpr,
):
    """A program a cut: how long a piece is, the sums of the segments' pieces, and, of the last cut, the order of the segments
    where none is cut.
    """
    cut = tl.program_id(0)
    length, whole = tl.where(cut == 0, length, next_length), tl.where(cut == 0, whole, next_whole)
    first_ptr += cut * (num_segments + 1)
    longest = tl.full((), 1, tl.int64)
    for start in range(0, num_segments, BLOCK):
        segment = start + tl.arange(0, BLOCK)
        inside = segment < num_segments
        begin = tl.load(cu_seqlens_ptr + segment, mask=inside, other=0)
        end = tl.load(cu_seqlens_ptr + segment + 1, mask=inside, other=0)
        longest = tl.maximum(longest, tl.max(end - begin, 0))
    length = tl.where(longest <= whole, longest, length)
    tl.store(length_ptr + cut, length)
    carry = tl.full((), 0, tl.int64)
    tl.store(first_ptr, carry)
    for start in range(0, num_segments, BLOCK):
        segment = start + tl.arange(0, BLOCK)
        inside = segment < num_segments
        begin = tl.load(cu_seqlens_ptr + segment, mask=inside, other=0)
        end = tl.load(cu_seqlens_ptr + segment + 1, mask=inside, other=0)
        pieces = tl.where(inside, tl.maximum((end - begin + length - 1) // length, 1), 0)
        tl.store(first_ptr + segment + 1, carry + tl.cumsum(pieces, 0), mask=inside)
        carry += tl.sum(pieces, 0)
    if order_ptr is not None:
        segment = tl.arange(0, ORDERED)
        inside = segment < num_segments
        begin = tl.load(cu_seqlens_ptr + segment, mask=inside, other=0)
        size = tl.where(inside, tl.load(cu_seqlens_ptr + segment + 1, mask=inside, other=0) - begin, -1)
        alike = (size[None, :] == size[:, None]) & (segment[None, :] < segment[:, None])
        before = tl.sum(((size[None, :] > size[:, None]) | alike).to(tl.int64), 1)
        ordered = tl.where(cut == tl.num_programs(0) - 1, num_segments, 0)
        place = tl.where(longest <= whole, before, segment)
        tl.store(order_ptr + place, segment.to(tl.int64), mask=segment < ordered)


@triton.jit
def _cut_kernel(
    cu_seqlens_ptr, first_ptr, length_ptr, borders_ptr, owner_ptr, order_ptr, leading_ptr, trailing_ptr, begins_ptr,
    num_segments, count, next_count, num_listed, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some pieces of a cut. `order`, `leading` and `trailing` are of the last, `begins` of the second: with which of the
    first's pieces each begins.
    """
    blocks = tl.cdiv(count, BLOCK)
    cut = tl.where(tl.program_id(0) < blocks, 0, 1)
    num_pieces = tl.where(cut == 0, count, next_count)
    piece = (tl.program_id(0) - cut * blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = piece < num_pieces
    length = tl.load(length_ptr + cut)
    cut_first_ptr = first_ptr + cut * (num_segments + 1)
    # The last segment whose first piece is not after this one, by bisection.
    low = tl.zeros((BLOCK,), tl.int64)
    high = low + num_segments
    for _ in range(STEPS):
        middle = (low + high) // 2
        below = tl.load(cut_first_ptr + middle, mask=exists, other=0) <= piece
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    inside = exists & (piece < tl.load(cut_first_ptr + num_segments))
    begin = tl.load(cu_seqlens_ptr + low, mask=exists, other=0)
    end = tl.load(cu_seqlens_ptr + low + 1, mask=exists, other=0)
    first = tl.load(cut_first_ptr + low, mask=exists, other=0)
    after = tl.load(cut_first_ptr + low + 1, mask=exists, other=0)
    start = begin + (piece - first) * length
    stop = tl.minimum(start + length, end)
    before = cut.to(tl.int64) * count
    for kind in tl.static_range(2):
        kept = inside if kind == 0 else inside & (after - first > 1)
        at = 2 * (2 * before + kind * num_pieces + piece)
        tl.store(borders_ptr + at, tl.where(kept, start, 0), mask=exists)
        tl.store(borders_ptr + at + 1, tl.where(kept, stop, 0), mask=exists)
    tl.store(owner_ptr + before + piece, low, mask=exists)
    if (next_count == 0) | (cut == 1):
        if order_ptr is not None:
            tl.store(order_ptr + piece, piece, mask=exists & (piece >= num_segments))
        # Each segment before has one piece that is not listed.
        turn = piece - low
        tl.store(leading_ptr + turn, piece, mask=inside & (piece + 1 < after) & (turn < num_listed))
        tl.store(trailing_ptr + turn - 1, piece, mask=inside & (piece > first) & (turn <= num_listed))
        spare = (piece >= tl.load(cut_first_ptr + num_segments) - num_segments) & (piece < num_listed)
        tl.store(leading_ptr + piece, num_pieces - 1, mask=spare)
        tl.store(trailing_ptr + piece, num_pieces - 1, mask=spare)
    if begins_ptr is not None:
        smaller = tl.load(first_ptr + low, mask=exists, other=0) + (start - begin) // tl.load(length_ptr)
        tl.store(begins_ptr + piece, tl.minimum(smaller, count - 1), mask=piece < tl.where(cut == 1, num_pieces, 0))


class Cut(NamedTuple):
    """How segments are cut."""

    length: int
    """Tokens of a piece, of which a segment's last may have fewer."""
    whole: int = 0
    """None is cut if the longest has no more tokens than these."""


def _cut(cu_seqlens: Tensor, num_tokens: int, max_length: int, *cuts: Cut) -> list[Splits]:
    """Segments cut in one way, or in two, of which the second's pieces are made up of the first's."""
    num_segments = cu_seqlens.numel() - 1
    counts = [num_pieces(num_tokens, num_segments, cut.length) for cut in cuts]
    count, next_count = (*counts, 0)[:2]
    first, chosen = cu_seqlens.new_empty(len(cuts), num_segments + 1), cu_seqlens.new_empty(len(cuts))
    owner, borders = cu_seqlens.new_empty(sum(counts)), cu_seqlens.new_empty(2 * sum(counts), 2)
    order = cu_seqlens.new_empty(counts[-1]) if cuts[-1].whole and num_segments <= MOST_ORDERED else None
    # One that is not the last of its segment is full.
    leading, trailing = (cu_seqlens.new_empty(num_tokens // cuts[-1].length) for _ in range(2))
    begins = cu_seqlens.new_empty(next_count) if next_count else None
    block = block_of(num_segments)
    launch_kernel(
        _first_kernel, len(cuts), cu_seqlens, first, chosen, order, num_segments, *cuts[0], *cuts[-1],
        BLOCK=min(block, SEGMENTS_BLOCK), ORDERED=block,
    )  # fmt: skip
    launch_kernel(
        _cut_kernel, sum(cdiv(count, PIECES_BLOCK) for count in counts), cu_seqlens, first, chosen, borders, owner, order,
        leading, trailing, begins, num_segments, count, next_count, leading.numel(), STEPS=num_segments.bit_length(),
        BLOCK=PIECES_BLOCK,
    )  # fmt: skip
    splits, before = [], 0
    for number, (cut, count) in enumerate(zip(cuts, counts, strict=True)):
        every, several = borders[2 * before : 2 * (before + count)].unflatten(0, (2, -1))
        most, is_last = max(cdiv(max_length, cut.length), 1), number == len(cuts) - 1
        splits.append(
            Splits(
                every, first[number], owner[before : before + count], leading if is_last else None,
                trailing if is_last else None, several, most, order if is_last else None, begins if number else None,
            )
        )  # fmt: skip
        before += count
    return splits


def cut(cu_seqlens: Tensor, num_tokens: int, length: int, max_length: int, *, whole: int = 0) -> Splits:
    """Segments cut into pieces of `length` tokens and a rest; none is cut if the longest has at most `whole` tokens."""
    return _cut(cu_seqlens, num_tokens, max_length, Cut(length, whole))[0]
