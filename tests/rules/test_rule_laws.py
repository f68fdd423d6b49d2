"""The laws of a rule over every registered rule and its options."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings

from linear_moe import get_rule, rule_names
from linear_moe.rules.chunked import LONGEST_CHUNK
from linear_moe.testing import RULE_LAWS, Case, Law
from linear_moe.testing.strategies import BORDER_LENGTHS, rule_cases

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "linear_attention": [{}, {"feature_map": "relu"}, {"feature_map": "elu", "normalize": True}],
    "retnet": [{}, {"rope_base": 50.0}],
    "gla": [{}, {"gate_rank": 1, "gate_divisor": 1.0}],
    "mamba2": [{}, {"num_groups": 2}],
    "deltanet": [{}, {"allow_negative_eigenvalues": True}],
    "gated_deltanet": [{}, {"allow_negative_eigenvalues": True}],
}

LAWS = {law.name: law for law in RULE_LAWS}

every_rule = pytest.mark.parametrize("rule", rule_names())


PAIRS = [(law, rule) for law in RULE_LAWS for rule in rule_names() if law.applies(get_rule(rule))]


@pytest.mark.parametrize("law, rule", [pytest.param(law, rule, id=f"{law.name}-{rule}") for law, rule in PAIRS])
def test_law(law: Law, rule: str) -> None:
    """`test_law[the law-the rule]`, so that a failure names both."""

    @settings(max_examples=min(6, law.max_examples or 6))
    @given(rule_cases(get_rule(rule), options=OPTIONS.get(rule, [{}]), sizes=law.sizes))
    def holds(case: Case) -> None:
        law(case)

    holds()


@every_rule
@pytest.mark.parametrize("kind", ["drawn", "extreme"])
@pytest.mark.parametrize("head_dim", [2, 2 * LONGEST_CHUNK], ids=["shortest chunks", "longest chunks"])
def test_the_borders_of_chunks(head_dim: int, kind: str, rule: str) -> None:
    """No token, one, and a token less and more than every length of chunk; one head, K != V."""
    for length in BORDER_LENGTHS:
        case = Case(get_rule(rule), lengths=(length,), head_dim=head_dim, head_value_dim=1, tokens=kind, seed=length)
        LAWS["chunked-equals-recurrent"](case)
        LAWS["split-equals-whole"](case)


def test_laws_have_names_of_their_own() -> None:
    assert len(LAWS) == len(RULE_LAWS)
