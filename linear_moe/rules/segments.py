"""Index arithmetic between the tokens of an input and the segments, steps and chunks an implementation walks.

Dense input `[B, T]` is B segments of T tokens; packed input `[1, S]` is cut by `cu_seqlens`. Sizes are static unless the
tensors are on a CPU, where reading the lengths is free and spares empty work. Tokens past the last border belong to no
segment: nothing reads them, and their output is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.rules.looks import may_look
from linear_moe.static_tensors import static


@dataclass(frozen=True)
class Segments:
    """The segments of an input of `num_tokens` tokens, flattened over B and T."""

    cu_seqlens: Tensor
    """`[N + 1]` int64."""
    num_tokens: int
    max_length: int
    dense: bool
    """Every segment has `max_length` tokens and together they are the whole input."""

    @property
    def count(self) -> int:
        """N"""
        return self.cu_seqlens.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """`[N]` int64."""
        return self.cu_seqlens.diff()


@static
def batch_borders(batch: int, length: int, device: torch.device) -> Tensor:
    """`cu_seqlens` of a batch without pads."""
    return torch.arange(batch + 1, device=device) * length


def segments_of(
    batch: int, length: int, cu_seqlens: Tensor | None, max_length: int | None, device: torch.device
) -> Segments:
    """The segments of an input `[B, T, ...]`; `max_length` bounds a packed segment's tokens without a look at them."""
    if cu_seqlens is None:
        return Segments(batch_borders(batch, length, device), batch * length, length, dense=True)
    borders = cu_seqlens.to(device=device, dtype=torch.int64)
    if may_look(device) and borders.numel() > 1:
        # At least 1: with every token in no segment there is still a graph to give gradients of 0.
        max_length = max(int(borders.diff().max()), 1)
    return Segments(borders, length, length if max_length is None else min(max_length, length), dense=False)


def pad_segments(x: Tensor, segments: Segments) -> Tensor:
    """`[S, ...]` to `[N, L, ...]`, rows past a segment's end 0."""
    if segments.dense:
        return x.unflatten(0, (segments.count, segments.max_length))
    offsets = torch.arange(segments.max_length, device=x.device)
    inside = offsets < segments.lengths[:, None]
    return _take(x, segments.cu_seqlens[:-1, None] + offsets, inside)


def unpad_segments(x: Tensor, segments: Segments) -> Tensor:
    """`[N, L, ...]` back to `[S, ...]`."""
    if segments.dense:
        return x.flatten(0, 1)
    segment, position, covered = _locate(segments)
    return _take(x.flatten(0, 1), segment * segments.max_length + position, covered)


@dataclass(frozen=True)
class DenseChunks:
    """Chunks of dense input, ordered by step, then segment, then head: a step of the walk is a slice."""

    segments: Segments
    length: int
    """C"""
    heads: int

    @property
    def num_steps(self) -> int:
        """Chunks of a segment; the last may be padded with rows of 0."""
        return -(-self.segments.max_length // self.length)

    def parts(self, limit: int) -> list[tuple[slice, slice]]:
        """Runs of about `limit` tokens: each one's steps, and its matrices among those of every step."""
        count = self.segments.count
        stride = max(limit // (self.length * count), 1)
        starts = range(0, self.num_steps, stride)
        steps = [slice(start, min(start + stride, self.num_steps)) for start in starts]
        return [(part, slice(part.start * count * self.heads, part.stop * count * self.heads)) for part in steps]

    def split(self, x: Tensor) -> Tensor:
        """`[S, H, *]`, or a `room`, as `[steps, N, H, C, *]`: a view, but for a last chunk that is not full."""
        rows = x.view(self.segments.count, -1, *x.shape[1:])
        missing = self.num_steps * self.length - rows.shape[1]
        if missing:
            rows = F.pad(rows, (0, 0, 0, 0, 0, missing))
        return rows.unflatten(1, (-1, self.length)).permute(1, 0, 3, 2, 4)

    def room(self, x: Tensor) -> Tensor:
        """Where a result like `x` `[S, H, *]` is written by chunks, `[N * steps * C, H, *]`."""
        return x.new_empty((self.segments.count * self.num_steps * self.length, *x.shape[1:]))

    def taken(self, room: Tensor) -> Tensor:
        """`[S, H, *]` of a room."""
        rows = room.unflatten(0, (self.segments.count, -1))
        return rows[:, : self.segments.max_length].flatten(0, 1)

    def merge(self, x: Tensor) -> Tensor:
        """The matrices `[steps * N * H, C, V]` back to `[S, H, V]`."""
        rows = x.unflatten(0, (-1, self.segments.count, self.heads)).permute(1, 0, 3, 2, 4)
        return self.taken(rows.flatten(0, 2))

    def by_step(self, x: Tensor) -> tuple[Tensor, ...]:
        """One `[N * H, *, *]` a step."""
        return x.view(-1, self.segments.count * self.heads, *x.shape[1:]).unbind(0)

    def by_chunk(self, steps: list[Tensor]) -> Tensor:
        """The reverse of `by_step`."""
        return torch.cat(steps)

    def where_reached(self, step: int, new: Tensor, old: Tensor) -> Tensor:
        """The states after a step, `new`: every segment has every chunk."""
        return new


@dataclass(frozen=True)
class PackedChunks:
    """Chunks of packed input, ordered by segment, then step, then head."""

    length: int
    """C"""
    heads: int
    source: Tensor
    """`[NC, C]` the token of each row."""
    valid: Tensor
    """`[NC, C]` whether the row holds a token."""
    target: Tensor
    """`[S]` the row of each token."""
    covered: Tensor
    """`[S]` whether the token is in a segment."""
    chunk: Tensor
    """`[num_steps, N]` the chunk a segment is in at a step."""
    exists: Tensor
    """`[num_steps, N]` whether the segment reaches that step."""
    step: Tensor
    """`[NC]` index into `[num_steps * N]` of each chunk."""

    def split(self, x: Tensor) -> Tensor:
        """`[S, H, *]` to `[NC, H, C, *]`, rows without a token 0."""
        return _take(x, self.source, self.valid).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        """`[NC * H, C, V]` back to `[S, H, V]`; 0 for tokens in no segment."""
        rows = x.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(0, 1)
        return _take(rows, self.target, self.covered)

    def by_step(self, x: Tensor) -> tuple[Tensor, ...]:
        """One `[N * H, *, *]` a step. One gather for all steps: its gradient is one scatter, not one a step."""
        chunks = x.unflatten(0, (-1, self.heads)).index_select(0, self.chunk.flatten())
        return chunks.reshape(*self.chunk.shape[:1], -1, *x.shape[1:]).unbind(0)

    def by_chunk(self, steps: list[Tensor]) -> Tensor:
        """The reverse of `by_step`."""
        return torch.cat(steps).unflatten(0, (-1, self.heads)).index_select(0, self.step).flatten(0, 1)

    def where_reached(self, step: int, new: Tensor, old: Tensor) -> Tensor:
        """The states after a step: a segment without a chunk there keeps its state, bit for bit."""
        exists = self.exists[step].repeat_interleave(self.heads)
        return torch.where(exists[:, None, None], new, old)


Chunks = DenseChunks | PackedChunks


def cut(segments: Segments, chunk_length: int, heads: int) -> Chunks:
    """Cut `segments` into chunks of `chunk_length` rows."""
    if segments.dense:
        return DenseChunks(segments, chunk_length, heads)
    device = segments.cu_seqlens.device
    num_steps = -(-segments.max_length // chunk_length)
    per_segment = (segments.lengths + chunk_length - 1) // chunk_length
    first_chunk = F.pad(per_segment.cumsum(0), (1, 0))
    # At most one chunk of a segment is not full, which bounds their number without a look at the lengths.
    bound = segments.num_tokens // chunk_length + segments.count
    num_chunks = max(int(first_chunk[-1]), 1) if may_look(device) else bound

    chunks = torch.arange(num_chunks, device=device)
    owner = torch.searchsorted(first_chunk[1:], chunks, right=True).clamp_max(segments.count - 1)
    step = chunks - first_chunk[owner]
    offset = step[:, None] * chunk_length + torch.arange(chunk_length, device=device)

    segment, position, covered = _locate(segments)
    target = (first_chunk[segment] + position // chunk_length) * chunk_length + position % chunk_length
    steps = torch.arange(num_steps, device=device)[:, None]
    exists = steps < per_segment
    return PackedChunks(
        length=chunk_length,
        heads=heads,
        source=segments.cu_seqlens[owner, None] + offset,
        valid=offset < segments.lengths[owner, None],
        target=target,
        covered=covered,
        chunk=torch.where(exists, first_chunk[:-1] + steps, 0),
        exists=exists,
        # Chunks past the last (only where their number is a bound) hold no token: any start does.
        step=(step * segments.count + owner).clamp_max(max(num_steps * segments.count - 1, 0)),
    )


def _locate(segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token `[S]`: its segment, its place in it, and whether it is in one."""
    tokens = torch.arange(segments.num_tokens, device=segments.cu_seqlens.device)
    segment = torch.searchsorted(segments.cu_seqlens[1:], tokens, right=True)
    covered = segment < segments.count
    segment = segment.clamp_max(segments.count - 1)
    return segment, tokens - segments.cu_seqlens[segment], covered


def _take(x: Tensor, index: Tensor, keep: Tensor) -> Tensor:
    """Rows of `x` at `index`, 0 where not `keep`. A row is kept at most once, so the gradient adds in no order."""
    rows = x.index_select(0, torch.where(keep, index, 0).flatten()).unflatten(0, index.shape)
    # where, not a product: a row that is not kept may hold anything, NaN included
    return torch.where(keep.reshape(*keep.shape, *(1,) * (rows.dim() - keep.dim())), rows, 0)
