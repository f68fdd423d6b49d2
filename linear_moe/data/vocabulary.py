"""What a model's tokens stand for: text in, tokens out, and back."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from linear_moe.data.text import DOCUMENT_START, VOCAB_SIZE, document_tokens
from linear_moe.data.token_names import byte_labels, byte_name


class Vocabulary(ABC):
    """How text and tokens are made of each other."""

    start: tuple[int, ...] = ()
    """Tokens before a text's first."""
    stop_token: int | None = None
    """The token after a text's last."""
    turn_end: str = ""
    """What ends a turn of a conversation."""
    separator: str = ""
    """What stands between two pieces of text."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The tokens of a text.

        Raises:
            ValueError: if it does not fit the vocabulary.
        """

    @abstractmethod
    def read(self, path: Path) -> list[int]:
        """The tokens of a file. Raises as `encode`."""

    @abstractmethod
    def decoder(self) -> Decoder:
        """For the tokens of a text, as they come."""

    def labels(self, tokens: Sequence[int]) -> list[str]:
        """Each token of a text as people read it there."""
        return [str(token) for token in tokens]

    def name(self, token: int) -> str:
        """A token as people read it by itself."""
        return str(token)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens."""
        decoder = self.decoder()
        return "".join(map(decoder.push, tokens)) + decoder.finish()


class TextVocabulary(Vocabulary):
    """Tokens that stand for text."""

    turn_end = "\n"
    unit: str
    """What one token is called."""

    @abstractmethod
    def document(self, content: bytes) -> Tensor:
        """`[n + 1]` of a document: the document start, then its tokens.

        Raises:
            ValueError: if it does not fit the vocabulary.
        """

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without a start."""
        return self.document(text.encode("utf-8", "surrogateescape"))[1:].tolist()

    def read(self, path: Path) -> list[int]:
        """The tokens of a file, without a start."""
        return self.document(path.read_bytes())[1:].tolist()


class Decoder(ABC):
    """Text from tokens that come one at a time."""

    @abstractmethod
    def push(self, token: int) -> str:
        """What can be shown after this token."""

    def finish(self) -> str:
        """What was held back."""
        return ""


class ByteVocabulary(TextVocabulary):
    """Bytes of any text, and a document start."""

    start = (DOCUMENT_START,)
    stop_token = DOCUMENT_START
    unit = "byte"

    def document(self, content: bytes) -> Tensor:
        """Its bytes, whatever they are."""
        return document_tokens(content)

    def labels(self, tokens: Sequence[int]) -> list[str]:
        """A character at its first byte; what is no valid UTF-8 in hexadecimal digits."""
        return byte_labels(tokens)

    def name(self, token: int) -> str:
        """A character, or what it is called."""
        return byte_name(token)

    def decoder(self) -> Decoder:
        """A character is shown when its last byte has come."""
        return _Utf8Decoder()


class _Utf8Decoder(Decoder):
    def __init__(self) -> None:
        self._codec = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._codec.decode(bytes([token])) if token < DOCUMENT_START else ""

    def finish(self) -> str:
        return self._codec.decode(b"", True)


class NumberVocabulary(Vocabulary):
    """Tokens by their numbers, separated by blanks or commas: for models of no text.

    Args:
        size: numbers are below it.
    """

    separator = " "

    def __init__(self, size: int) -> None:
        self.size = size

    def encode(self, text: str) -> list[int]:
        """The numbers in it."""
        words = text.replace(",", " ").split()
        for word in words:
            if not (word.isascii() and word.isdecimal()):
                raise ValueError(
                    f"this model reads token numbers, such as '1 33 2 34'; {word!r:.40} in the prompt is none"
                )
            if int(word) >= self.size:
                raise ValueError(f"tokens must be in [0, vocab_size = {self.size}), got {word}")
        return [int(word) for word in words]

    def read(self, path: Path) -> list[int]:
        """The numbers in it."""
        try:
            return self.encode(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(path)!r} holds no token numbers: {error}") from None

    def decoder(self) -> Decoder:
        """Numbers with blanks between them."""
        return _NumberDecoder()


class _NumberDecoder(Decoder):
    def __init__(self) -> None:
        self._blank = ""

    def push(self, token: int) -> str:
        text, self._blank = f"{self._blank}{token}", " "
        return text


def vocabulary_of(vocab_size: int) -> Vocabulary:
    """What the tokens of a model with so many stand for: bytes with a document start, or else only their numbers."""
    return ByteVocabulary() if vocab_size == VOCAB_SIZE else NumberVocabulary(vocab_size)
