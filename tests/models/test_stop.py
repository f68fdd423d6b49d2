"""Stop sequences: what is shown is the text up to the first of them, and not a token later than it must be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linear_moe.models.stop import StopSequences

TOKENS = st.lists(st.integers(0, 2), max_size=30)


def cut(tokens: list[int], sequences: list[list[int]]) -> tuple[list[int], bool]:
    """By looking at the whole text so far after every token."""
    for end in range(1, len(tokens) + 1):
        for sequence in sequences:
            if tokens[max(end - len(sequence), 0) : end] == sequence:
                return tokens[: end - len(sequence)], True
    return tokens, False


@given(TOKENS, st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop(tokens: list[int], sequences: list[list[int]]) -> None:
    stop, shown = StopSequences(sequences), []
    wanted, hit = cut(tokens, sequences)
    for count, token in enumerate(tokens, 1):
        shown += stop.push(token)
        assert shown == wanted[: len(shown)]
        if not stop.hit:
            # What is held back begins a stop sequence.
            held = tokens[len(shown) : count]
            assert not held or any(sequence[: len(held)] == held for sequence in sequences)
    assert stop.hit == hit
    assert shown + stop.finish() == wanted


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="a stop text must not be empty"):
        StopSequences([[1], []])
