"""Perplexity by position: whether a model goes on getting better, or breaks, past the lengths it was trained on."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.data.text import document_tokens
from linear_moe.evaluation.result import Column, Result, Track, untracked
from linear_moe.evaluation.segments import Sizes, hidden_in_segments
from linear_moe.models.model import LanguageModel
from linear_moe.training.tasks import check_text_vocabulary

FIRST_BUCKET = 64
"""Positions of the first bucket; each further one is as long as all before it."""

COLUMNS = (
    Column("begin", "from", ","),
    Column("end", "to", ","),
    Column("bytes", "bytes", ","),
    Column("bits_per_byte", "bits per byte", ".4f"),
    Column("perplexity", "perplexity", ".3f"),
    Column("trained", "trained on"),
)


@torch.no_grad()
def perplexity_by_position(
    model: LanguageModel,
    documents: Sequence[bytes],
    *,
    length: int = 4096,
    num_sequences: int = 8,
    trained_length: int | None = None,
    sizes: Sizes | None = None,
    track: Track = untracked,
) -> Result:
    """Bits per byte and perplexity of a byte given all before it, by its position in the text.

    Args:
        model: of bytes.
        documents: pieces of `length` bytes are cut from those that are long enough, the first of each document first.
        length: positions that are looked at.
        num_sequences: pieces, at most; all that there are if fewer.
        trained_length: what the model was trained on, to mark what lies beyond.
        sizes: how much is done at once.
        track: told how far it is.

    Raises:
        ValueError: naming the argument that does not fit; if no document is long enough.
    """
    check_text_vocabulary(model.config.vocab_size, model.config.name or "the model")
    for name, value in (("length", length), ("num_sequences", num_sequences), ("trained_length", trained_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    sizes = sizes or Sizes()
    pieces = _pieces(documents, length, num_sequences)
    device = next(model.parameters()).device
    nats = torch.zeros(length, dtype=torch.float64)
    for start, stop in sizes.batches(len(pieces), length):
        batch = torch.stack(pieces[start:stop]).long().to(device)
        labels = batch[:, 1:]
        for place, hidden in hidden_in_segments(model, batch[:, :-1], sizes.segment):
            end = place + hidden.shape[1]
            losses = F.cross_entropy(
                model.logits(hidden).float().flatten(0, 1), labels[:, place:end].flatten(), reduction="none"
            )
            nats[place:end] += losses.view(stop - start, -1).double().sum(0).cpu()
            track(start * length + (stop - start) * end, len(pieces) * length)
    rows = [_row(nats, begin, end, len(pieces), trained_length) for begin, end in buckets(length)]
    whole = _row(nats, 0, length, len(pieces), trained_length)
    remark = (
        f"{len(pieces)} pieces of {length:,} bytes; all positions together {whole['bits_per_byte']:.4f} bits per byte."
    )
    return Result("perplexity", "perplexity by position in the text", COLUMNS, rows, (remark,))


def buckets(length: int) -> list[tuple[int, int]]:
    """Ranges of positions [begin, end) up to `length`: the first of `FIRST_BUCKET`, each further one up to twice as far."""
    edges = [0]
    while edges[-1] < length:
        edges.append(min(max(2 * edges[-1], FIRST_BUCKET), length))
    return list(itertools.pairwise(edges))


def _row(nats: Tensor, begin: int, end: int, sequences: int, trained_length: int | None) -> dict[str, Any]:
    count = (end - begin) * sequences
    mean = float(nats[begin:end].sum()) / count
    trained = None if trained_length is None else _trained(begin, end, trained_length)
    perplexity = math.exp(mean) if mean < math.log(sys.float_info.max) else math.inf
    return {
        "begin": begin,
        "end": end,
        "bytes": count,
        "bits_per_byte": mean / math.log(2),
        "perplexity": perplexity,
        "trained": trained,
    }


def _trained(begin: int, end: int, trained_length: int) -> str:
    if end <= trained_length:
        return "yes"
    return "beyond" if begin >= trained_length else "in part"


def _pieces(documents: Sequence[bytes], length: int, count: int) -> list[Tensor]:
    """`[length + 1]` tokens each: inputs and the byte after the last."""
    long_enough = [document_tokens(document) for document in documents if len(document) >= length]
    if not long_enough:
        longest = max(map(len, documents), default=0)
        raise ValueError(
            f"length = {length:,} needs a document of that many bytes, the longest here has {longest:,}; take a shorter "
            f"length or a longer text"
        )
    pieces: list[Tensor] = []
    place = 0
    while len(pieces) < count:
        found = [tokens[place : place + length + 1] for tokens in long_enough if tokens.numel() > place + length]
        if not found:
            break
        pieces += found
        place += length
    return pieces[:count]
