"""Hypothesis strategies that draw the cases of a law. Needs the extra `testing`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from linear_moe.rules.base import UpdateRule
from linear_moe.rules.chunked import LONGEST_CHUNK, SHORTEST_CHUNK
from linear_moe.testing.laws import ORDINARY_SIZES, Case, Sizes

Options = Mapping[str, Any]

BORDER_LENGTHS = tuple(
    sorted({0, 1, *(chunk + off for chunk in (SHORTEST_CHUNK, LONGEST_CHUNK) for off in (-1, 0, 1))})
)
"""No token, one, and both sides of where a chunk ends."""

LAYER_SIZES = Sizes(tokens=(1, 24), num_heads=(1, 2))
"""A layer's definition is taken token by token, memory by memory."""

_NO_OPTIONS: tuple[Options, ...] = ({},)


def rule_cases(
    rule: type[UpdateRule], *, options: Iterable[Options] = _NO_OPTIONS, sizes: Sizes = ORDINARY_SIZES
) -> st.SearchStrategy[Case]:
    """Cases of a law of rules: sequences of any lengths, heads of any sizes that the rule takes.

    Args:
        rule: the rule's class.
        options: sets of the rule's options to choose from.
        sizes: the law's.
    """
    return _cases(rule, list(options), sizes)


def layer_cases(
    rule: type[UpdateRule], *, options: Iterable[Options] = _NO_OPTIONS, sizes: Sizes = LAYER_SIZES
) -> st.SearchStrategy[Case]:
    """Cases of a law of layers: beside `rule_cases`, the memories and the layer's own options."""
    return _layer_cases(rule, list(options), sizes)


@st.composite
def _cases(draw: st.DrawFn, rule: type[UpdateRule], options: list[Options], sizes: Sizes) -> Case:
    num_heads = draw(st.integers(*sizes.num_heads))
    case = Case(
        rule,
        options=draw(st.sampled_from(options)),
        lengths=draw(lengths(sizes)),
        num_heads=num_heads,
        num_value_heads=num_heads * draw(st.integers(1, 2)),
        head_dim=draw(st.integers(*sizes.head_dim)),
        head_value_dim=draw(st.integers(*sizes.head_dim)),
        tokens=draw(st.sampled_from(sizes.kinds)),
        seed=draw(st.integers(0, 999)),
    )
    try:
        case.build()
    except ValueError:
        # Sizes that the rule refuses, such as an odd number of channels.
        assume(False)
    return case


@st.composite
def lengths(draw: st.DrawFn, sizes: Sizes = ORDINARY_SIZES) -> tuple[int, ...]:
    """Lengths of one sequence or of several, ragged or equal, empty ones among them."""
    least, most = sizes.tokens
    short = st.integers(0, 9)
    border = st.sampled_from([length for length in BORDER_LENGTHS if length <= most] or [0])
    one = short | border | st.integers(0, most)
    drawn = draw(st.lists(one, min_size=1, max_size=4) | st.tuples(one, st.integers(2, 3)).map(_batch))
    kept: list[int] = []
    for length in drawn:
        kept.append(min(length, most - sum(kept)))
    kept[-1] += max(0, least - sum(kept))
    return tuple(kept)


def _batch(size: tuple[int, int]) -> list[int]:
    length, count = size
    return [length] * count


@st.composite
def _layer_cases(draw: st.DrawFn, rule: type[UpdateRule], options: list[Options], sizes: Sizes) -> Case:
    case = draw(_cases(rule, options, replace(sizes, kinds=("rule",))))
    num_memories = draw(st.integers(1, 4))
    layer_options = {
        "conv_scope": draw(st.sampled_from(["memory", "sequence"])),
        "conv_width": draw(st.integers(1, 4)),
        "memory_projections": draw(st.sampled_from(["memory", "shared"])),
        "query_projection": draw(st.sampled_from(["shared", "memory"])),
        "router_score": draw(st.sampled_from(["softmax", "sigmoid"])),
        "renormalize": draw(st.booleans()),
        "learned_initial_memory": draw(st.booleans()),
    }
    return replace(
        case,
        hidden_size=draw(st.integers(4, 12)),
        num_memories=num_memories,
        top_k=draw(st.integers(1, num_memories)),
        shared_memory=draw(st.booleans()),
        layer_options=layer_options,
    )
