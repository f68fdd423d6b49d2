"""Text as it is written: the same in the end, and nothing of a stop text on the way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from linear_moe.cli.written import Written
from linear_moe.data.vocabulary import ByteVocabulary, NumberVocabulary

TEXT = st.text("abé€", max_size=24)


@given(TEXT, st.lists(st.text("abé€", min_size=1, max_size=3), max_size=3))
def test_the_text_ends_before_the_first_stop_text(text: str, stops: list[str]) -> None:
    written, shown = Written(ByteVocabulary(), stops), ""
    for token in text.encode():
        shown += written.push(token)
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    assert written.stopped == bool(ends)
    first = min(ends, default=len(text))
    # Of those that end first the one that is listed first is taken off.
    stop = next((stop for stop in stops if text[:first].endswith(stop)), "") if ends else ""
    assert text.startswith(shown)
    assert shown + written.finish() == text[: first - len(stop)]


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    written = Written(ByteVocabulary(), ["x"])
    assert [written.push(token) for token in b"a\xc3"] == ["a", ""]
    assert written.finish() == "\N{REPLACEMENT CHARACTER}"


def test_numbers_stop_by_whole_tokens() -> None:
    written = Written(NumberVocabulary(100), ["5 6"])
    assert "".join(map(written.push, [15, 6, 5])) == "15 6"
    assert not written.stopped
    assert written.push(6) == "" and written.stopped
    assert written.push(7) == written.finish() == ""
    held = Written(NumberVocabulary(100), ["5 6"])
    assert held.push(5) == "" and held.finish() == "5"
