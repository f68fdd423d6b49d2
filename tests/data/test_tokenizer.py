"""Tokenisers: what they make of text, and what is refused."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizer import VOCABULARY, write_tokenizer

from linear_moe.data.text_batches import PackedText, held_out_batches
from linear_moe.data.tokenizer import BYTES, FileTokenizer, load_tokenizer
from linear_moe.models.extras import MissingExtraError

TEXT = "the fox, the dög\n and the quick\u2028fox"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "any-name.json")


def test_a_file_is_read_without_what_its_first_user_set(file: Path) -> None:
    tokenizer = FileTokenizer(file)
    assert (tokenizer.vocab_size, tokenizer.document_start) == (VOCABULARY, 1)
    (tokens,) = tokenizer.encode([TEXT.encode()])
    assert int(tokens[0]) == 1
    assert 5 < tokens.numel() < len(TEXT.encode())
    assert 0 not in tokens.tolist()
    assert tokenizer.decode(tokens.tolist()) == TEXT


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=4))
def test_what_is_encoded_is_decoded(texts: list[str]) -> None:
    for tokens, text in zip(BYTES.encode([text.encode() for text in texts]), texts, strict=True):
        assert BYTES.decode(tokens.tolist()) == text


def test_packed_tokens_are_those_of_the_documents(file: Path) -> None:
    tokenizer = FileTokenizer(file)
    documents = [(TEXT * n).encode() for n in (1, 3, 2)]
    batches = held_out_batches(documents, context=7, batch_tokens=10, limit=10**6, tokenizer=tokenizer)
    labels = [token for batch in batches for token in batch.labels[0].tolist()]
    assert labels == [token for tokens in tokenizer.encode(documents) for token in tokens[1:].tolist()]
    packed = PackedText(documents, context=7, batch_tokens=10, tokenizer=tokenizer).batch(0)
    assert packed.cu_seqlens is not None
    for start, end in itertools.pairwise(packed.cu_seqlens.tolist()):
        assert packed.tokens[0, start + 1 : end].tolist() == packed.labels[0, start : end - 1].tolist()


def test_a_checkpoint_keeps_it_with_its_document_start(file: Path, tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is BYTES
    for name, content in FileTokenizer(file, "<pad>").files().items():
        (tmp_path / name).write_bytes(content)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.vocab_size, loaded.document_start) == (VOCABULARY, 0)
    assert not BYTES.files()


@pytest.mark.parametrize("size", [VOCABULARY, 300, 512])
def test_a_models_vocabulary_may_be_rounded_up(file: Path, size: int) -> None:
    FileTokenizer(file).check_model(size, "m")


@pytest.mark.parametrize("size", [257, VOCABULARY - 1, 513, 32_000])
def test_another_vocabulary_is_refused_with_both_sizes(file: Path, size: int) -> None:
    with pytest.raises(
        ValueError, match=rf"vocab_size of m is {size}, but the tokeniser .* has 280 tokens: .* most 512"
    ):
        FileTokenizer(file).check_model(size, "m")


def test_bytes_have_one_vocabulary() -> None:
    BYTES.check_model(257, "m")
    with pytest.raises(
        ValueError, match="vocab_size of m must be 257 for text .*, got 64; .* needs a tokeniser's file"
    ):
        BYTES.check_model(64, "m")


def test_what_is_no_tokeniser_is_refused(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is no file"):
        FileTokenizer(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"bad\.json' is no tokenizer\.json"):
        FileTokenizer(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="document_start '<x>' is no token"):
        FileTokenizer(file, "<x>")
    with pytest.raises(ValueError, match="name the token that begins a document"):
        FileTokenizer(write_tokenizer(tmp_path / "bare.json", special=("<pad>",)))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'linear-moe\[data\]'"):
        FileTokenizer(file)
