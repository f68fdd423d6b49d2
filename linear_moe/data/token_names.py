"""Tokens as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from linear_moe.data.text import DOCUMENT_START

LINE_END = "\N{RETURN SYMBOL}"
"""Stands for a line end."""
_SIGNS = {"\n": LINE_END, "\t": "\N{RIGHTWARDS ARROW TO BAR}", "\r": "\N{LEFTWARDS ARROW}"}
_NAMES = {0x0A: "line end", 0x09: "tab", 0x0D: "carriage return", 0x20: "space", DOCUMENT_START: "document start"}
START = "\N{WHITE RIGHT-POINTING TRIANGLE}"
"""Stands for a document start."""
CONTINUED = "\N{MIDDLE DOT}"
"""Stands for a further byte of the character before it."""


def byte_labels(tokens: Sequence[int]) -> list[str]:
    """A label for each byte of a text, in the text: its character, at that character's first byte; a byte that is part of
    no valid UTF-8 as its number in hexadecimal digits after a backslash and an x.
    """
    labels: list[str] = []
    place = 0
    while place < len(tokens):
        if tokens[place] >= DOCUMENT_START:
            labels.append(START)
            place += 1
            continue
        character, width = _character(tokens, place)
        labels += [character] + [CONTINUED] * (width - 1)
        place += width
    return labels


def byte_name(token: int) -> str:
    """A byte by itself, in a list."""
    if token in _NAMES:
        return _NAMES[token]
    return chr(token) if 0x20 < token < 0x7F else f"\\x{token:02x}"


def _character(tokens: Sequence[int], place: int) -> tuple[str, int]:
    for width in range(1, 5):
        part = tokens[place : place + width]
        if len(part) < width or max(part) >= DOCUMENT_START:
            break
        try:
            character = bytes(part).decode("utf-8")
        except UnicodeDecodeError:
            continue
        return sign_of(character), width
    return f"\\x{tokens[place]:02x}", 1


def sign_of(character: str) -> str:
    """A character, or what can be seen in place of one that can't."""
    if character in _SIGNS:
        return _SIGNS[character]
    return character if character.isprintable() else f"\\u{ord(character):04x}"
