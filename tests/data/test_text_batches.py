"""Packing: every byte is predicted once an epoch, from its own document only."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linear_moe.data.batch import Batch
from linear_moe.data.text import DOCUMENT_START
from linear_moe.data.text_batches import PackedText, held_out_batches


def _segments(batch: Batch) -> list[tuple[list[int], list[int]]]:
    assert batch.cu_seqlens is not None
    borders = batch.cu_seqlens.tolist()
    assert borders[0] == 0
    assert borders[-1] == batch.tokens.shape[1]
    assert batch.max_length is not None and max(b - a for a, b in itertools.pairwise(borders)) <= batch.max_length
    tokens, labels = batch.tokens[0].tolist(), batch.labels[0].tolist()
    return [(tokens[a:b], labels[a:b]) for a, b in itertools.pairwise(borders)]


documents = st.lists(st.binary(max_size=40), min_size=1, max_size=6).filter(any)


@given(documents, st.integers(1, 12), st.integers(1, 30), st.integers(0, 3))
def test_an_epoch_predicts_every_byte_once_from_its_own_document(
    texts: list[bytes], context: int, batch_tokens: int, seed: int
) -> None:
    total = sum(map(len, texts))
    if total < batch_tokens:
        with pytest.raises(ValueError, match="fewer than one batch"):
            PackedText(texts, context=context, batch_tokens=batch_tokens, seed=seed)
        return
    packed = PackedText(texts, context=context, batch_tokens=batch_tokens, seed=seed)
    predicted = []
    for index in range(packed.batches_per_epoch):
        batch = packed.batch(index)
        assert batch.tokens.shape == batch.labels.shape == (1, batch_tokens)
        for tokens, labels in _segments(batch):
            assert 1 <= len(tokens) <= context
            assert tokens[1:] == labels[:-1]
            piece = bytes(labels)
            assert any(piece in text for text in texts)
            if tokens[0] == DOCUMENT_START:
                assert any(text.startswith(piece) for text in texts)
            else:
                assert any(bytes([tokens[0]]) + piece in text for text in texts)
            predicted += labels
    counts = torch.tensor(predicted).bincount(minlength=256)
    wanted = torch.tensor(list(b"".join(texts))).bincount(minlength=256)
    assert (counts <= wanted).all()
    assert int((wanted - counts).sum()) == total % batch_tokens < batch_tokens


def test_batches_depend_on_their_index_alone_and_epochs_differ() -> None:
    texts = [bytes(range(i, i + 20)) for i in range(0, 200, 20)]
    first, again = (PackedText(texts, context=7, batch_tokens=50, seed=3) for _ in range(2))
    ahead = again.batch(9)
    assert all(torch.equal(first.batch(i).tokens, again.batch(i).tokens) for i in (0, 5, 2))
    assert torch.equal(first.batch(9).tokens, ahead.tokens)
    assert not torch.equal(first.batch(0).tokens, first.batch(first.batches_per_epoch).tokens)


def test_held_out_text_is_read_in_order_and_up_to_the_limit() -> None:
    texts = [b"abcdef", b"", b"gh"]
    batches = list(held_out_batches(texts, context=4, batch_tokens=3, limit=100))
    assert bytes(label for batch in batches for label in batch.labels[0].tolist()) == b"abcdefgh"
    assert [len(tokens) for batch in batches for tokens, _ in _segments(batch)] == [3, 1, 2, 2]
    assert sum(batch.num_labels for batch in held_out_batches(texts, context=4, batch_tokens=3, limit=5)) == 5
    assert not list(held_out_batches([b""], context=4, batch_tokens=3, limit=5))


@pytest.mark.parametrize("name", ["context", "batch_tokens"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        PackedText([b"abc"], **{"context": 2, "batch_tokens": 2, name: 0})
