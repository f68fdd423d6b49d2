"""The grammar of `layers`: what it expands to, and where it says a pattern is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linear_moe.models.pattern import MAX_LAYERS, PatternError, expand_pattern

NAMES = ("memory", "recall", "a-b_2")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("memory", ["memory"]),
        ("(memory*2 recall)*2", ["memory", "memory", "recall"] * 2),
        (" ( memory  recall ) *\n2 a-b_2 ", ["memory", "recall", "memory", "recall", "a-b_2"]),
        ("((memory)*2)*1", ["memory", "memory"]),
        ("memory(recall)memory*007", ["memory", "recall", *["memory"] * 7]),
        (f"memory*{MAX_LAYERS}", ["memory"] * MAX_LAYERS),
        ("(" * 5000 + "memory" + ")" * 5000, ["memory"]),
    ],
)
def test_expands(pattern: str, expected: list[str]) -> None:
    assert expand_pattern(pattern, NAMES) == expected


def spelled(parts: list[tuple[str, list[str], int]]) -> tuple[str, list[str]]:
    """Terms, each a text and what it expands to, one after another."""
    return " ".join(text for text, _, _ in parts), [name for _, names, count in parts for name in names * count]


terms = st.recursive(
    st.tuples(st.sampled_from(NAMES), st.integers(1, 3)).map(lambda t: (f"{t[0]}*{t[1]}", [t[0]], t[1])),
    lambda inner: st.tuples(st.lists(inner, min_size=1, max_size=3), st.integers(1, 3)).map(
        lambda t: (f"({spelled(t[0])[0]})*{t[1]}", spelled(t[0])[1], t[1])
    ),
    max_leaves=6,
)


@given(st.lists(terms, min_size=1, max_size=3))
def test_every_nesting_expands_to_what_it_spells(parts: list[tuple[str, list[str], int]]) -> None:
    text, expected = spelled(parts)
    assert expand_pattern(text, NAMES) == expected


@pytest.mark.parametrize(
    ("pattern", "position", "message"),
    [
        ("", 0, "the pattern is empty"),
        ("  ", 0, "the pattern is empty"),
        ("memory memroy", 7, "unknown block 'memroy'; did you mean 'memory'? allowed: memory, recall, a-b_2"),
        ("memory*0", 7, "expected a count of at least 1 after '*', got 0"),
        ("memory**2", 7, "expected a count after '*', got '*'"),
        ("memory*", 7, "expected a count after '*', got the end"),
        ("memory*2*2", 8, "expected a block name or '(', got '*'"),
        ("memory 2", 7, "expected a block name or '(', got '2'"),
        ("(memory", 0, "'(' is never closed"),
        ("memory (recall (memory) ", 7, "'(' is never closed"),
        ("memory)", 6, "')' closes no '('"),
        ("()", 1, "expected a block name or '(' in the parentheses"),
        ("memory, recall", 6, "unexpected ','"),
        ("memory*-1", 7, "unexpected '-'"),
        ("(memory*101)*100", 13, "at most 10,000 layers in all, got 10,100"),
        ("memory*10000 memory", 13, "at most 10,000 layers in all, got 10,001"),
        ("memory*" + "9" * 5000, 7, "at most 10,000 layers"),
    ],
)
def test_errors_show_the_place(pattern: str, position: int, message: str) -> None:
    with pytest.raises(PatternError) as caught:
        expand_pattern(pattern, NAMES)
    text = str(caught.value)
    assert message in text
    assert caught.value.position == position
    head, shown, caret = text.split("\n")
    assert head.endswith(f"at position {position + 1}")
    assert shown[4:] == pattern
    assert caret.index("^") == 4 + position
