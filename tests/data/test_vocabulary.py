"""Text to tokens and back, all at once or as they come."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linear_moe.data.text import DOCUMENT_START
from linear_moe.data.vocabulary import ByteVocabulary, NumberVocabulary, vocabulary_of

BYTES = ByteVocabulary()


@given(st.text(max_size=20))
def test_text_is_its_bytes_and_comes_back(text: str) -> None:
    tokens = BYTES.encode(text)
    assert bytes(tokens) == text.encode()
    assert BYTES.decode([DOCUMENT_START, *tokens]) == text
    assert BYTES.document(text.encode()).tolist() == [DOCUMENT_START, *tokens]


@given(st.binary(max_size=20))
def test_characters_come_when_they_are_whole(content: bytes) -> None:
    decoder, shown = BYTES.decoder(), ""
    for count, token in enumerate(content, 1):
        shown += decoder.push(token)
        # Never more than what those bytes say, and no character is begun that a later byte would change.
        assert content[:count].decode("utf-8", errors="replace").startswith(shown)
        assert content.decode("utf-8", errors="replace").startswith(shown)
    assert shown + decoder.finish() == content.decode("utf-8", errors="replace")


@given(st.lists(st.integers(0, 99), max_size=8))
def test_numbers_come_back(numbers: list[int]) -> None:
    vocabulary = NumberVocabulary(100)
    assert vocabulary.encode(vocabulary.decode(numbers)) == numbers
    assert vocabulary.encode(", ".join(map(str, numbers))) == numbers
    assert vocabulary.labels(numbers) == list(map(str, numbers))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    vocabulary = NumberVocabulary(10)
    for text in ("1 x", "-1", "1.5", "²"):
        with pytest.raises(ValueError, match="in the prompt is none"):
            vocabulary.encode(text)
    with pytest.raises(ValueError, match=r"tokens must be in \[0, vocab_size = 10\), got 10"):
        vocabulary.encode("3 10")
    (tmp_path / "a").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="a' holds no token numbers"):
        vocabulary.read(tmp_path / "a")
    assert BYTES.read(tmp_path / "a") == [255]


def test_the_vocabulary_follows_from_its_size() -> None:
    assert isinstance(vocabulary_of(257), ByteVocabulary)
    other = vocabulary_of(256)
    assert isinstance(other, NumberVocabulary) and other.size == 256
