"""Bytes as people read them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from linear_moe.data.text import DOCUMENT_START
from linear_moe.data.token_names import CONTINUED, LINE_END, START, byte_labels, byte_name


@given(
    st.lists(st.one_of(st.binary(max_size=4), st.text(max_size=3).map(lambda s: s.encode()), st.none()), max_size=12)
)
def test_each_byte_has_a_label(parts: list[bytes | None]) -> None:
    tokens = [t for part in parts for t in ([DOCUMENT_START] if part is None else part)]
    labels = byte_labels(tokens)
    assert len(labels) == len(tokens)
    assert [i for i, t in enumerate(tokens) if t == DOCUMENT_START] == [
        i for i, label in enumerate(labels) if label == START and tokens[i] > 255
    ]
    assert all(label.isprintable() and label for label in labels)
    assert all(byte_name(t).isprintable() and byte_name(t).strip() for t in tokens)


def test_labels_are_characters_where_there_are_any() -> None:
    text = "aé€😀".encode()
    assert byte_labels([*text]) == ["a", "é", CONTINUED, "€", *CONTINUED * 2, "😀", *CONTINUED * 3]
    assert byte_labels([0xC3, 0xFF, 0x41, 0xE2, 0x82]) == ["\\xc3", "\\xff", "A", "\\xe2", "\\x82"]
    # A character does not reach over a document start.
    assert byte_labels([0xC3, DOCUMENT_START, 0xA9]) == ["\\xc3", START, "\\xa9"]
    assert byte_labels([*b"\n\t\0"]) == [LINE_END, "⇥", "\\u0000"]
    # What would turn the direction of a line is named, not done.
    assert byte_labels([*"\u202e".encode()])[0] == "\\u202e"
    assert [byte_name(t) for t in (0x20, 0x0A, 0x41, 0xFF)] == ["space", "line end", "A", "\\xff"]
