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


def segments_of(batch: int, length: int, cu_seqlens: Tensor | None, max_length: int | None, device: torch.device) -> Segments:
    """The segments of an input `[B, T, ...]`; `max_length` bounds a packed segment's tokens without a look at them."""
    if cu_seqlens is None:
        return Segments(torch.arange(batch + 1, device=device) * length, batch * length, length, dense=True)
    borders = cu_seqlens.to(device=device, dtype=torch.int64)
    if device.type == "cpu" and borders.numel() > 1:
        max_length = int(borders.diff().max())
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
class ChunkLayout:
    """How the tokens of each segment fall into chunks of `length` rows, segments laid end to end."""

    segments: Segments
    length: int
    num_steps: int
    """Chunks of the longest segment."""
    source: Tensor | None = None
    """`[NC, C]` the token of each row. None for dense input, as is the rest."""
    valid: Tensor | None = None
    """`[NC, C]` whether the row holds a token."""
    target: Tensor | None = None
    """`[S]` the row of each token."""
    covered: Tensor | None = None
    """`[S]` whether the token is in a segment."""
    chunk: Tensor | None = None
    """`[num_steps, N]` the chunk a segment is in at a step."""
    exists: Tensor | None = None
    """`[num_steps, N]` whether the segment reaches that step."""
    step: Tensor | None = None
    """`[NC]` index into `[num_steps * N]` of each chunk."""

    def split(self, x: Tensor) -> Tensor:
        """`[S, ...]` to `[NC, C, ...]`, rows without a token 0."""
        if self.source is not None and self.valid is not None:
            return _take(x, self.source, self.valid)
        rows = x.unflatten(0, (self.segments.count, self.segments.max_length))
        missing = self.num_steps * self.length - self.segments.max_length
        if missing:
            rows = F.pad(rows, (0, 0) * (rows.dim() - 2) + (0, missing))
        return rows.reshape(self.segments.count * self.num_steps, self.length, *x.shape[1:])

    def merge(self, x: Tensor) -> Tensor:
        """`[NC, C, ...]` back to `[S, ...]`; 0 for tokens in no segment."""
        if self.target is not None and self.covered is not None:
            return _take(x.flatten(0, 1), self.target, self.covered)
        rows = x.reshape(self.segments.count, self.num_steps * self.length, *x.shape[2:])
        return rows[:, : self.segments.max_length].flatten(0, 1)

    def by_step(self, x: Tensor) -> tuple[Tensor, ...]:
        """`[NC, ...]` to one `[N, ...]` a step. One gather for all steps: its gradient is one scatter, not one a step."""
        if self.chunk is None:
            return x.unflatten(0, (self.segments.count, self.num_steps)).unbind(1)
        return x.index_select(0, self.chunk.flatten()).unflatten(0, self.chunk.shape).unbind(0)

    def by_chunk(self, steps: list[Tensor]) -> Tensor:
        """One `[N, ...]` a step back to `[NC, ...]`."""
        if self.step is None:
            return torch.stack(steps, 1).flatten(0, 1)
        return torch.cat(steps).index_select(0, self.step)


def chunk_layout(segments: Segments, chunk_length: int) -> ChunkLayout:
    """Cut `segments` into chunks of `chunk_length` rows."""
    num_steps = -(-segments.max_length // chunk_length)
    if segments.dense:
        return ChunkLayout(segments, chunk_length, num_steps)
    device = segments.cu_seqlens.device
    per_segment = (segments.lengths + chunk_length - 1) // chunk_length
    first_chunk = F.pad(per_segment.cumsum(0), (1, 0))
    # At most one chunk of a segment is not full, which bounds their number without a look at the lengths.
    bound = segments.num_tokens // chunk_length + segments.count
    num_chunks = int(first_chunk[-1]) if device.type == "cpu" else bound

    chunks = torch.arange(num_chunks, device=device)
    owner = torch.searchsorted(first_chunk[1:], chunks, right=True).clamp_max(segments.count - 1)
    step = chunks - first_chunk[owner]
    offset = step[:, None] * chunk_length + torch.arange(chunk_length, device=device)
    valid = offset < segments.lengths[owner, None]

    segment, position, covered = _locate(segments)
    target = (first_chunk[segment] + position // chunk_length) * chunk_length + position % chunk_length
    steps = torch.arange(num_steps, device=device)[:, None]
    exists = steps < per_segment
    return ChunkLayout(
        segments=segments,
        length=chunk_length,
        num_steps=num_steps,
        source=segments.cu_seqlens[owner, None] + offset,
        valid=valid,
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
