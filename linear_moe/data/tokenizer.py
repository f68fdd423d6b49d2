"""Text as token numbers: bytes, or what a tokenizer.json of the `tokenizers` library makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from linear_moe.data.text import DOCUMENT_START, VOCAB_SIZE, decode_tokens, document_tokens
from linear_moe.models.extras import require

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
"""Their names in a checkpoint."""
VOCABULARY_MULTIPLE = 256
"""A model's vocabulary may be the tokeniser's rounded up to a multiple of this, for the sake of the hardware."""
_STARTS = ("<|endoftext|>", "<s>", "<bos>", "<|begin_of_text|>", "[BOS]", "<|startoftext|>", "</s>", "[CLS]")


class Tokenizer(Protocol):
    """What makes token numbers of documents, and text of token numbers."""

    vocab_size: int
    document_start: int
    """The token before a document's first."""

    def encode(self, documents: Sequence[bytes]) -> list[Tensor]:
        """Each document `[n + 1]`: its start, then its tokens; in the narrowest of int16 and int32 that has them all."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Text; document starts are nothing."""

    def check_model(self, vocab_size: int, name: str) -> None:
        """Raises ValueError unless a model of this vocabulary can be trained on it."""

    def files(self) -> dict[str, bytes]:
        """What `load_tokenizer` reads it from again, by name."""


class ByteTokenizer:
    """Every byte is a token; 256 is the document start. Needs no file and no package."""

    vocab_size = VOCAB_SIZE
    document_start = DOCUMENT_START

    def encode(self, documents: Sequence[bytes]) -> list[Tensor]:
        """Each document `[bytes + 1]` int16."""
        return [document_tokens(document) for document in documents]

    def decode(self, tokens: Iterable[int]) -> str:
        """What is no valid UTF-8 becomes the replacement character."""
        return decode_tokens(tokens)

    def check_model(self, vocab_size: int, name: str) -> None:
        """Bytes have exactly one vocabulary."""
        if vocab_size != VOCAB_SIZE:
            raise ValueError(
                f"vocab_size of {name} must be {VOCAB_SIZE} for text (256 bytes and a document start), got {vocab_size}; "
                f"another vocabulary needs a tokeniser's file"
            )

    def files(self) -> dict[str, bytes]:
        """None."""
        return {}


BYTES = ByteTokenizer()


class FileTokenizer:
    """A tokenizer.json, as the `tokenizers` library and the models of Hugging Face have it.

    Args:
        path: of the file.
        document_start: the token that begins a document; unless given the first that the file has of <|endoftext|>, <s>,
            <bos> and their like.

    Raises:
        ValueError: if the file is none, or has no such token.
        MissingExtraError: if `tokenizers` is not installed.
    """

    def __init__(self, path: str | Path, document_start: str | None = None) -> None:
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"tokenizer {str(path)!r} is no file")
        tokenizers = require("tokenizers", extra="data")
        self.source = str(path)
        self._content = file.read_bytes()
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(self._content)
        except Exception as error:
            # The library raises plain exceptions.
            raise ValueError(f"tokenizer {str(path)!r} is no tokenizer.json: {error}") from error
        # What was set for its first user would cut and pad documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        # Numbers may have gaps.
        self.vocab_size = max(vocabulary.values()) + 1
        self._start = _start_of(vocabulary, document_start, str(path))
        self.document_start = vocabulary[self._start]
        self._dtype = torch.int16 if self.vocab_size <= 1 << 15 else torch.int32

    def encode(self, documents: Sequence[bytes]) -> list[Tensor]:
        """Each document `[tokens + 1]`. Special tokens that a template would add are left out."""
        texts = [document.decode("utf-8") for document in documents]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [torch.tensor([self.document_start, *encoding.ids], dtype=self._dtype) for encoding in encodings]

    def decode(self, tokens: Iterable[int]) -> str:
        """Without special tokens."""
        text: str = self._tokenizer.decode([token for token in tokens if token != self.document_start])
        return text

    def check_model(self, vocab_size: int, name: str) -> None:
        """The model has all of its tokens, and no more than rounding up explains."""
        largest = -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        if not self.vocab_size <= vocab_size <= largest:
            raise ValueError(
                f"vocab_size of {name} is {vocab_size}, but the tokeniser {self.source!r} has {self.vocab_size} tokens: "
                f"the model's must be that, or rounded up to at most {largest}"
            )

    def files(self) -> dict[str, bytes]:
        """The file itself, and the document start under the name that other libraries look for."""
        start = json.dumps({"bos_token": self._start}) + "\n"
        return {TOKENIZER_FILE: self._content, TOKENIZER_CONFIG_FILE: start.encode()}


def load_tokenizer(checkpoint: Path) -> Tokenizer:
    """The tokeniser of a checkpoint: its tokenizer.json with the document start it was trained with, or bytes."""
    file, config = checkpoint / TOKENIZER_FILE, checkpoint / TOKENIZER_CONFIG_FILE
    if not file.is_file():
        return BYTES
    return FileTokenizer(file, json.loads(config.read_bytes())["bos_token"] if config.is_file() else None)


def _start_of(vocabulary: dict[str, int], wanted: str | None, path: str) -> str:
    if wanted is not None:
        if wanted not in vocabulary:
            raise ValueError(f"document_start {wanted!r} is no token of {path!r}")
        return wanted
    for token in _STARTS:
        if token in vocabulary:
            return token
    raise ValueError(
        f"the tokeniser {path!r} has none of {', '.join(_STARTS)}: name the token that begins a document (document_start)"
    )
