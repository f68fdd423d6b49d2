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

from linear_moe.data.vocabulary import TextVocabulary
from linear_moe.evaluation.result import Column, Result, Track, untracked
from linear_moe.evaluation.segments import Sizes, hidden_in_segments
from linear_moe.models.model import LanguageModel

FIRST_BUCKET = 64
"""Positions of the first bucket; each further one is as long as all before it."""


@torch.no_grad()
def perplexity_by_position(
    model: LanguageModel,
    documents: Sequence[bytes],
    vocabulary: TextVocabulary,
    *,
    length: int = 4096,
    num_sequences: int = 8,
    trained_length: int | None = None,
    sizes: Sizes | None = None,
    track: Track = untracked,
) -> Result:
    """Bits a token and perplexity of a token given all before it, by its position in the text.

    Args:
        model: of text.
        documents: pieces of `length` tokens are cut from those that are long enough, the first of each document first.
        vocabulary: of the model.
        length: positions that are looked at.
        num_sequences: pieces, at most; all that there are if fewer.
        trained_length: what the model was trained on, to mark what lies beyond.
        sizes: how much is done at once.
        track: told how far it is.

    Raises:
        ValueError: naming the argument that does not fit; if no document is long enough.
    """
    for name, value in (("length", length), ("num_sequences", num_sequences), ("trained_length", trained_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    sizes = sizes or Sizes()
    pieces = _pieces([vocabulary.document(d) for d in documents], length, num_sequences, vocabulary.unit)
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
    unit = vocabulary.unit
    mean = whole["bits_per_token"]
    remark = f"{len(pieces)} pieces of {length:,} {unit}s; all positions together {mean:.4f} bits per {unit}."
    columns = (
        Column("begin", "from", ","),
        Column("end", "to", ","),
        Column("tokens", f"{unit}s", ","),
        Column("bits_per_token", f"bits per {unit}", ".4f"),
        Column("perplexity", "perplexity", ".3f"),
        Column("trained", "trained on"),
    )
    return Result("perplexity", "perplexity by position in the text", columns, rows, (remark,))


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
        "tokens": count,
        "bits_per_token": mean / math.log(2),
        "perplexity": perplexity,
        "trained": trained,
    }


def _trained(begin: int, end: int, trained_length: int) -> str:
    if end <= trained_length:
        return "yes"
    return "beyond" if begin >= trained_length else "in part"


def _pieces(documents: Sequence[Tensor], length: int, count: int, unit: str) -> list[Tensor]:
    """`[length + 1]` tokens each: inputs and the token after the last."""
    long_enough = [tokens for tokens in documents if tokens.numel() > length]
    if not long_enough:
        longest = max((tokens.numel() - 1 for tokens in documents), default=0)
        raise ValueError(
            f"length = {length:,} needs a document of that many {unit}s, the longest here has {longest:,}; take a shorter "
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
