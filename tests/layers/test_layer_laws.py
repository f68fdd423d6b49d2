"""The layer laws over every registered rule, its options and those of the layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linear_moe import get_rule, rule_names
from linear_moe.testing.laws import Case, Law
from linear_moe.testing.layer_laws import LAYER_LAWS
from linear_moe.testing.strategies import LAYER_SIZES, layer_cases

RULE_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "linear_attention": [{"short_conv": True}, {"feature_map": "elu", "normalize": True}],
    "retnet": [{"short_conv": True, "rope_base": 100.0}],
    "gla": [{"gate_rank": 3, "gate_divisor": 2.0, "short_conv": True}],
    "mamba2": [{"num_groups": 2}],
    "deltanet": [{"allow_negative_eigenvalues": True, "short_conv": False}],
    "gated_deltanet": [{"allow_negative_eigenvalues": True, "short_conv": False}],
}
LAWS = {law.name: law for law in LAYER_LAWS}


def cases(rule: str) -> st.SearchStrategy[Case]:
    """The cases of `check_rule`, no tokens at all among them, with every option of the rule and more of the layer's."""
    drawn = layer_cases(
        get_rule(rule), options=[{}, *RULE_OPTIONS.get(rule, [])], sizes=replace(LAYER_SIZES, tokens=(0, 24))
    )
    return st.builds(
        lambda case, impl, rate: replace(
            case, layer_options={**case.layer_options, "impl": impl, "balance_bias_rate": rate}
        ),
        drawn,
        st.sampled_from(["auto", "recurrent"]),
        st.sampled_from([0.0, 0.1]),
    )


@pytest.mark.parametrize("rule", rule_names())
@pytest.mark.parametrize("law", LAYER_LAWS, ids=lambda law: law.name)
def test_it_holds(law: Law, rule: str) -> None:
    @settings(max_examples=6)
    @given(cases(rule))
    def holds(case: Case) -> None:
        law(case)

    holds()


@pytest.mark.parametrize("rule", rule_names())
@pytest.mark.parametrize("length", [64, 65])
@pytest.mark.parametrize("law", ["layer-gradients", "layer-splits", "layer-causal", "layer-carried-gradients"])
def test_it_holds_across_long_chunks(law: str, length: int, rule: str) -> None:
    LAWS[law](Case(get_rule(rule), lengths=(length,), num_memories=2, head_dim=4, seed=length))


def test_the_laws_have_names_of_their_own() -> None:
    assert len(LAWS) == len(LAYER_LAWS)
