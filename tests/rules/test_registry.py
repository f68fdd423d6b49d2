"""One registry of names: what may be registered, and what is said of a name that isn't."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
from torch import Tensor

from linear_moe import UpdateRule, get_rule, register_rule, rule_names
from linear_moe.rules import GLA, Tokens, registry


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten."""
    rule_names()
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


@dataclass(frozen=True)
class Sum(UpdateRule):
    """S + k v."""

    @staticmethod
    def step(state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        state = state + token.k[..., :, None] * token.v[..., None, :]
        return state, (token.q[..., None, :] @ state).squeeze(-2)


def test_a_registered_rule_is_found_and_knows_its_name() -> None:
    assert register_rule("my_sum")(Sum) is Sum
    assert get_rule("my_sum") is Sum
    assert Sum.name == "my_sum"
    assert "my_sum" in rule_names()
    assert rule_names() == sorted(rule_names())


def test_the_rules_of_this_package_are_registered() -> None:
    assert {"deltanet", "gated_deltanet", "gla", "linear_attention", "mamba2", "retnet"} <= set(rule_names())
    assert get_rule("gla") is GLA
    assert GLA.name == "gla"


def test_the_same_class_may_be_defined_again() -> None:
    """As a notebook's cell does when it runs twice."""

    def define() -> type[UpdateRule]:
        @register_rule("twice")
        @dataclass(frozen=True)
        class Twice(Sum):
            """A subclass."""

        return Twice

    first, second = define(), define()
    assert first is not second
    assert get_rule("twice") is second


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the rule name 'gla' is taken by linear_moe\.rules\.gla\.GLA") as error:
        register_rule("gla")(Sum)
    assert "Sum" in str(error.value)
    assert get_rule("gla") is GLA


@pytest.mark.parametrize("name", ["My_Rule", "my-rule", "", "1st", 3, None])
def test_a_name_must_be_a_lower_case_identifier(name: object) -> None:
    with pytest.raises(ValueError, match="must be a lower-case identifier") as error:
        register_rule(name)  # type: ignore[arg-type]
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("thing", [object, len, "gla"])
def test_only_rules_are_registered(thing: object) -> None:
    with pytest.raises(ValueError, match="subclass of UpdateRule") as error:
        register_rule("thing")(thing)  # type: ignore[type-var]
    assert repr(thing) in str(error.value)


@pytest.mark.parametrize(
    ("name", "near"), [("gated_delta_net", "gated_deltanet"), ("mamba", "mamba2"), ("delta", "deltanet")]
)
def test_an_unknown_rule_names_the_nearest_and_all(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown rule '{name}'; did you mean '{near}'\?") as error:
        get_rule(name)
    for known in rule_names():
        assert known in str(error.value)


def test_a_name_near_nothing_names_all() -> None:
    with pytest.raises(ValueError, match=r"unknown rule 'xyz'; registered: deltanet, ") as error:
        get_rule("xyz")
    assert "did you mean" not in str(error.value)


def test_options_are_fields_with_help() -> None:
    """What the schema and the docs are made of."""
    for name in rule_names():
        for field in dataclasses.fields(get_rule(name)):
            assert field.name == "dims" or field.metadata["help"], f"{name}.{field.name}"
