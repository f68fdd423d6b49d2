"""The grammar of `layers`: which block stands where, as in "(memory*7 recall)*3".

    pattern = term+          term = (name | "(" pattern ")") ["*" count]

Names are block names; white space separates and is otherwise free.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from linear_moe.models.errors import choices

MAX_LAYERS = 10_000
"""Beyond any model, and soon enough that a typing error in a count does not fill the memory."""
NAME = r"[A-Za-z_][A-Za-z0-9_-]*"

_TOKEN = re.compile(rf"(?P<name>{NAME})|(?P<count>[0-9]+)|(?P<symbol>[()*])")


class PatternError(ValueError):
    """A pattern that can't be read. The message shows the place with a caret."""

    def __init__(self, pattern: str, position: int, message: str) -> None:
        self.position = position
        # One line, so that the caret stands under what it points at.
        shown = re.sub(r"\s", " ", pattern)
        super().__init__(f"{message}, at position {position + 1}\n    {shown}\n    {' ' * position}^")


class _Token(NamedTuple):
    kind: str
    text: str
    position: int


class _Group(NamedTuple):
    names: list[str]
    opened: int


def expand_pattern(pattern: str, block_names: Collection[str]) -> list[str]:
    """The block name of each layer.

    Args:
        pattern: such as "(memory*7 recall)*3".
        block_names: the names that may stand in it.

    Raises:
        PatternError: with the position and what was expected there.
    """
    tokens = _tokens(pattern)
    if len(tokens) == 1:
        raise PatternError(pattern, 0, f"the pattern is empty; expected a block name ({', '.join(block_names)}) or '('")
    groups = [_Group([], -1)]
    at = 0
    while tokens[at].kind != "end":
        token = tokens[at]
        at += 1
        if token.text == "(":
            groups.append(_Group([], token.position))
            continue
        if token.kind == "name":
            if token.text not in block_names:
                message = f"unknown block {token.text!r}; {choices(token.text, block_names)}"
                raise PatternError(pattern, token.position, message)
            term = [token.text]
        elif token.text == ")" and len(groups) > 1:
            term = groups.pop().names
            if not term:
                raise PatternError(pattern, token.position, "expected a block name or '(' in the parentheses, got ')'")
        elif token.text == ")":
            raise PatternError(pattern, token.position, "')' closes no '('; expected a block name, '(' or the end")
        else:
            raise PatternError(pattern, token.position, f"expected a block name or '(', got {token.text!r}")
        if tokens[at].text == "*":
            term = _repeated(pattern, term, tokens[at + 1])
            at += 2
        groups[-1].names.extend(term)
        _check_size(pattern, token.position, len(groups[-1].names))
    if len(groups) > 1:
        raise PatternError(pattern, groups[-1].opened, "'(' is never closed; expected ')' before the end")
    return groups[0].names


def _tokens(pattern: str) -> list[_Token]:
    tokens, at = [], 0
    while at < len(pattern):
        if pattern[at].isspace():
            at += 1
            continue
        match = _TOKEN.match(pattern, at)
        if match is None:
            message = f"unexpected {pattern[at]!r}; allowed are block names, counts, '*', '(' and ')'"
            raise PatternError(pattern, at, message)
        assert match.lastgroup is not None
        tokens.append(_Token(match.lastgroup, match.group(), at))
        at = match.end()
    return [*tokens, _Token("end", "", len(pattern))]


def _repeated(pattern: str, term: list[str], count: _Token) -> list[str]:
    if count.kind != "count":
        got = repr(count.text) if count.text else "the end"
        raise PatternError(pattern, count.position, f"expected a count after '*', got {got}")
    # By length first: a count of thousands of digits is no number that Python will read.
    digits = count.text.lstrip("0")
    if not digits:
        raise PatternError(pattern, count.position, f"expected a count of at least 1 after '*', got {count.text}")
    if len(digits) > len(str(MAX_LAYERS)):
        raise PatternError(pattern, count.position, f"expected at most {MAX_LAYERS:,} layers in all, got a count above")
    _check_size(pattern, count.position, len(term) * int(digits))
    return term * int(digits)


def _check_size(pattern: str, position: int, size: int) -> None:
    if size > MAX_LAYERS:
        raise PatternError(pattern, position, f"expected at most {MAX_LAYERS:,} layers in all, got {size:,} up to here")
