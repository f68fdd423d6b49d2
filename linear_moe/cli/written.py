"""The text of what a model draws, up to a stop text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from linear_moe.data.vocabulary import TextVocabulary, Vocabulary
from linear_moe.models.stop import StopSequences


class Written:
    """One text, token by token.

    A stop text is looked for among the characters, since a tokeniser may cut it in more than one way; of numbers, among the
    tokens: 5 does not stand in 15.

    Args:
        vocabulary: of the tokens.
        stop: the texts that end it.

    Raises:
        ValueError: if one is empty, or does not fit the vocabulary.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str]) -> None:
        of_text = isinstance(vocabulary, TextVocabulary)
        self._tokens = StopSequences([] if of_text else [vocabulary.encode(text) for text in stop])
        self._characters = StopSequences(list(stop) if of_text else [])
        self._decoder = vocabulary.decoder()

    @property
    def stopped(self) -> bool:
        """Whether a stop text has been written."""
        return self._tokens.hit or self._characters.hit

    def push(self, token: int) -> str:
        """What can be shown after this token: nothing of a stop text, and nothing after one."""
        return self._free("".join(map(self._decoder.push, self._tokens.push(token))))

    def finish(self) -> str:
        """What was held back, when no more comes."""
        rest = "".join(map(self._decoder.push, self._tokens.finish())) + self._decoder.finish()
        return self._free(rest) + "".join(self._characters.finish())

    def _free(self, text: Iterable[str]) -> str:
        return "".join(free for character in text for free in self._characters.push(character))
