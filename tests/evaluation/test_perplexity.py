"""Perplexity by position: the full pass's own losses, gathered by where they stand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from checkpoints import small_model

from linear_moe.data.text import document_tokens
from linear_moe.data.vocabulary import ByteVocabulary
from linear_moe.evaluation import Sizes, perplexity_by_position
from linear_moe.evaluation.perplexity import buckets

BYTES = ByteVocabulary()
DOCUMENTS = [bytes((7 * i * i + i // 3 + d) % 256 for i in range(700 + 150 * d)) for d in range(2)]


def bits(rows: list[dict[str, float]]) -> torch.Tensor:
    return torch.tensor([row["bits_per_token"] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(segment=37, batch_tokens=1), Sizes(segment=1000, batch_tokens=600)])
def test_it_is_the_loss_of_a_full_pass_at_those_positions(sizes: Sizes) -> None:
    model, told = small_model().double(), []
    result = perplexity_by_position(
        model, DOCUMENTS, BYTES, length=300, num_sequences=3, sizes=sizes, track=lambda *at: told.append(at)
    )
    # The first piece of each document, then the second ones.
    pieces = [document_tokens(DOCUMENTS[d])[start : start + 301].long() for d, start in ((0, 0), (1, 0), (0, 300))]
    with torch.no_grad():
        losses = torch.stack(
            [torch.nn.functional.cross_entropy(model(p[None, :-1])[0].float(), p[1:], reduction="none") for p in pieces]
        ).double()
    ranges = [(0, 64), (64, 128), (128, 256), (256, 300)]
    assert [(row["begin"], row["end"]) for row in result.rows] == ranges
    wanted = torch.stack([losses[:, a:b].mean() for a, b in ranges]) / math.log(2)
    torch.testing.assert_close(bits(result.rows), wanted, rtol=1e-6, atol=0)
    assert [row["tokens"] for row in result.rows] == [3 * (b - a) for a, b in ranges]
    assert [row["perplexity"] for row in result.rows] == pytest.approx((2**wanted).tolist(), rel=1e-6)
    assert f"{float(losses.mean()) / math.log(2):.4f} bits per byte" in result.remarks[0]
    assert told[-1] == (900, 900)
    assert told == sorted(told)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary_everywhere() -> None:
    model = small_model()
    assert model.head is not None
    torch.nn.init.zeros_(model.head.weight)
    rows = perplexity_by_position(model, DOCUMENTS, BYTES, length=200, trained_length=100).rows
    assert [row["perplexity"] for row in rows] == pytest.approx([257] * 3, rel=1e-5)
    assert [row["trained"] for row in rows] == ["yes", "in part", "beyond"]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 4096, 5000])
def test_the_buckets_are_the_positions(length: int) -> None:
    ranges = buckets(length)
    assert ranges[0][0] == 0 and ranges[-1][1] == length
    assert all(a[1] == b[0] and b[0] < b[1] <= 2 * b[0] for a, b in itertools.pairwise(ranges))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"length = 900 needs a document of that many bytes, the longest here has 850"):
        perplexity_by_position(small_model(), DOCUMENTS, BYTES, length=900)
    with pytest.raises(ValueError, match="the longest here has 0"):
        perplexity_by_position(small_model(), [], BYTES, length=9)
    with pytest.raises(ValueError, match="num_sequences must be at least 1, got 0"):
        perplexity_by_position(small_model(), DOCUMENTS, BYTES, num_sequences=0)
    with pytest.raises(ValueError, match="segment must be at least 1, got 0"):
        Sizes(segment=0)
