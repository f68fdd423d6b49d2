"""The layer laws over every registered rule, its options and those of the layer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linear_moe import get_rule, rule_names
from linear_moe.testing.laws import Case, Law
from linear_moe.testing.layer_laws import LAYER_LAWS

RULE_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "linear_attention": [{"short_conv": True}, {"feature_map": "elu", "normalize": True}],
    "retnet": [{"short_conv": True, "rope_base": 100.0}],
    "gla": [{"gate_rank": 3, "gate_divisor": 2.0, "short_conv": True}],
    "mamba2": [{"num_groups": 2}],
    "deltanet": [{"allow_negative_eigenvalues": True, "short_conv": False}],
    "gated_deltanet": [{"allow_negative_eigenvalues": True, "short_conv": False}],
}


@st.composite
def lengths(draw: st.DrawFn) -> tuple[int, ...]:
    """A few short sequences, empty ones too; or one that crosses chunks of 16, 32 or 64."""
    if draw(st.integers(0, 3)) == 3:
        return (draw(st.sampled_from([15, 16, 17, 33, 65])),)
    return tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=3)))


@st.composite
def layer_cases(draw: st.DrawFn, rule: str) -> Case:
    num_memories = draw(st.integers(1, 5))
    num_heads = draw(st.integers(1, 2))
    layer_options: dict[str, Any] = {
        "conv_scope": draw(st.sampled_from(["memory", "sequence"])),
        "conv_width": draw(st.integers(1, 4)),
        "memory_projections": draw(st.sampled_from(["memory", "shared"])),
        "query_projection": draw(st.sampled_from(["shared", "memory"])),
        "router_score": draw(st.sampled_from(["softmax", "sigmoid"])),
        "renormalize": draw(st.booleans()),
        "learned_initial_memory": draw(st.booleans()),
        "balance_bias_rate": draw(st.sampled_from([0.0, 0.1])),
        "impl": draw(st.sampled_from(["auto", "recurrent"])),
    }
    options = draw(st.sampled_from([{}, *RULE_OPTIONS.get(rule, [])]))
    num_value_heads = num_heads * draw(st.sampled_from([1, 2]))
    if num_value_heads % options.get("num_groups", 1):
        num_value_heads *= 2
    return Case(
        get_rule(rule),
        options=options,
        lengths=draw(lengths()),
        num_heads=num_heads,
        num_value_heads=num_value_heads,
        head_dim=draw(st.sampled_from([2, 4, 6])),
        head_value_dim=draw(st.integers(1, 5)),
        hidden_size=draw(st.integers(6, 16)),
        num_memories=num_memories,
        top_k=draw(st.integers(1, num_memories)),
        shared_memory=draw(st.booleans()),
        layer_options=layer_options,
        seed=draw(st.integers(0, 10**6)),
    )


@pytest.mark.parametrize("rule", rule_names())
@pytest.mark.parametrize("law", LAYER_LAWS, ids=lambda law: law.name)
def test_it_holds(law: Law, rule: str) -> None:
    @settings(max_examples=6)
    @given(layer_cases(rule))
    def holds(case: Case) -> None:
        law(case)

    holds()


def test_the_laws_have_names_of_their_own() -> None:
    names = [law.name for law in LAYER_LAWS]
    assert len(set(names)) == len(names)
