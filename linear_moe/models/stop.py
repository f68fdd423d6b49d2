"""Ending a text where a given sequence has been written, without showing any of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

_T = TypeVar("_T")


class StopSequences(Generic[_T]):
    """Watches the tokens or characters of one text: hands on what can't belong to a stop sequence any more.

    Args:
        sequences: of tokens or characters, none of them empty; none at all for a text that nothing stops.

    Attributes:
        hit: whether one has been written. What comes after it is not handed on.

    Raises:
        ValueError: if a sequence is empty.
    """

    def __init__(self, sequences: Sequence[Sequence[_T]] = ()) -> None:
        if not all(sequences):
            raise ValueError("a stop text must not be empty")
        self.sequences = [list(sequence) for sequence in sequences]
        self.hit = False
        self._held: list[_T] = []

    def push(self, item: _T) -> list[_T]:
        """What is free to be shown after `item`."""
        if self.hit:
            return []
        held = self._held
        held.append(item)
        for sequence in self.sequences:
            if held[-len(sequence) :] == sequence:
                self.hit = True
                free = held[: -len(sequence)]
                held.clear()
                return free
        # The longest end of what is held that a stop sequence begins with stays; of one that is complete nothing would.
        longest = max((len(sequence) - 1 for sequence in self.sequences), default=0)
        keep = min(longest, len(held))
        while keep and not any(sequence[:keep] == held[-keep:] for sequence in self.sequences):
            keep -= 1
        free, self._held = held[: len(held) - keep], held[len(held) - keep :]
        return free

    def finish(self) -> list[_T]:
        """What was held back and no stop sequence came of."""
        free, self._held = self._held, []
        return free
