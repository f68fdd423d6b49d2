"""A tokeniser's tokens as a vocabulary: text in, tokens out, and back as they come."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from linear_moe.data.token_names import START, sign_of
from linear_moe.data.tokenizer import Tokenizer
from linear_moe.data.vocabulary import Decoder, TextVocabulary

_PARTIAL = "\N{REPLACEMENT CHARACTER}"


class TokenizerVocabulary(TextVocabulary):
    """What a tokeniser makes of UTF-8 text, and its document start.

    Args:
        tokenizer: of the model.
    """

    unit = "token"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.start = (tokenizer.document_start,)
        self.stop_token = tokenizer.document_start

    def document(self, content: bytes) -> Tensor:
        """Its tokens, which only valid UTF-8 has."""
        (tokens,) = self.tokenizer.encode([content])
        return tokens

    def decoder(self) -> Decoder:
        """A character is shown when all of its tokens have come."""
        return _TokenizerDecoder(self.tokenizer)

    def labels(self, tokens: Sequence[int]) -> list[str]:
        """Each token's own text; the replacement character for one that is part of a character."""
        return [self._label(token) for token in tokens]

    def name(self, token: int) -> str:
        """The same, with blanks that can be seen."""
        return self._label(token).replace(" ", "\N{OPEN BOX}")

    def _label(self, token: int) -> str:
        if token == self.tokenizer.document_start:
            return START
        return "".join(map(sign_of, self.tokenizer.decode([token]))) or f"#{token}"


class _TokenizerDecoder(Decoder):
    """What a token adds depends on those before it (blanks, bytes of a character), but not on all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        self._held.append(token)
        text = self._text()
        if text.endswith(_PARTIAL):
            return ""
        self._shown, self._held = self._held, []
        return text

    def finish(self) -> str:
        text, self._held = self._text() if self._held else "", []
        return text

    def _text(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode([*self._shown, *self._held])[len(before) :]
