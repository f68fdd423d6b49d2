"""Documents as packed batches: one row of many segments, in which no document sees another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from linear_moe.data.batch import Batch, seeded
from linear_moe.data.tokenizer import BYTES, Tokenizer


class PackedText:
    """Batches of text: `tokens` `[1, batch_tokens]` with `cu_seqlens`, so that no piece of text reads another.

    A document longer than `context` is cut into pieces of that length, each a segment of its own that starts without a
    memory of the piece before. An epoch is all pieces in a shuffled order, one after another, and a batch a run of
    `batch_tokens` tokens of it: a piece that crosses a batch's end is cut there too. What is left at an epoch's end and does
    not fill a batch is passed over in that epoch. Every token is predicted from what stands before it in its segment.

    Args:
        documents: as bytes; at least one that is not empty.
        context: tokens of a segment, at most.
        batch_tokens: tokens of a batch.
        seed: of the order.
        tokenizer: bytes unless given.

    Raises:
        ValueError: if the documents do not fill one batch.
    """

    def __init__(
        self,
        documents: Sequence[bytes],
        *,
        context: int,
        batch_tokens: int,
        seed: int = 0,
        tokenizer: Tokenizer = BYTES,
    ) -> None:
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
        self.context = context
        self.batch_tokens = batch_tokens
        self.seed = seed
        self._text, self._starts, self._lengths = _cut(documents, context, tokenizer)
        num_tokens = int(self._lengths.sum())
        self.batches_per_epoch = num_tokens // batch_tokens
        if not self.batches_per_epoch:
            raise ValueError(
                f"the text has {num_tokens:,} tokens to learn from, fewer than one batch of {batch_tokens:,} tokens; "
                f"take a smaller batch or more text"
            )
        self._epoch = -1
        self._order = self._ends = torch.empty(0, dtype=torch.int64)

    def batch(self, index: int) -> Batch:
        """Batch `index` of the endless sequence of epochs: a function of `index` alone, so that a run can be resumed."""
        epoch, row = divmod(index, self.batches_per_epoch)
        if epoch != self._epoch:
            self._order = torch.randperm(self._starts.numel(), generator=seeded(self.seed, epoch))
            self._ends = self._lengths[self._order].cumsum(0)
            self._epoch = epoch
        return _read(
            self._text, self._starts, self._order, self._ends, row * self.batch_tokens, self.batch_tokens, self.context
        )


def held_out_batches(
    documents: Sequence[bytes], *, context: int, batch_tokens: int, limit: int, tokenizer: Tokenizer = BYTES
) -> Iterator[Batch]:
    """The first `limit` tokens of the documents, in order, as packed batches; the last may be short."""
    text, starts, lengths = _cut(documents, context, tokenizer)
    order, ends = torch.arange(starts.numel()), lengths.cumsum(0)
    total = min(int(ends[-1]), limit) if ends.numel() else 0
    for start in range(0, total, batch_tokens):
        yield _read(text, starts, order, ends, start, min(batch_tokens, total - start), context)


def _cut(documents: Sequence[bytes], context: int, tokenizer: Tokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """All documents' tokens `[S]` int16 or int32, and each piece's first input and length `[P]` int64."""
    text = tokenizer.encode([document for document in documents if document])
    starts, lengths, offset = [], [], 0
    for tokens in text:
        # The last token is predicted and predicts nothing.
        inputs = tokens.numel() - 1
        begins = torch.arange(0, inputs, context)
        starts.append(offset + begins)
        lengths.append((inputs - begins).clamp_max(context))
        offset += tokens.numel()
    if not text:
        nothing = torch.empty(0, dtype=torch.int64)
        return nothing.short(), nothing, nothing
    return torch.cat(text), torch.cat(starts), torch.cat(lengths)


def _read(text: Tensor, starts: Tensor, order: Tensor, ends: Tensor, start: int, length: int, context: int) -> Batch:
    """Tokens [start, start + length) of the pieces of up to `context` laid end to end in `order`; `ends` is where each ends."""
    places = torch.arange(start, start + length)
    piece = torch.searchsorted(ends, places, right=True)
    begins = torch.cat((ends.new_zeros(1), ends[:-1]))
    source = starts[order[piece]] + places - begins[piece]
    borders = (piece.diff() != 0).nonzero().flatten() + 1
    cu_seqlens = torch.cat((borders.new_zeros(1), borders, borders.new_full((1,), length)))
    return Batch(text[source].long()[None], text[source + 1].long()[None], cu_seqlens, context)
