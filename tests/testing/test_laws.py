"""Cases that print as the call that makes them, laws that say what they found, and strategies that reach the borders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linear_moe.rules import GLA, Mamba2, RetNet
from linear_moe.rules.chunked import LONGEST_CHUNK
from linear_moe.testing import LAYER_LAWS, RULE_LAWS, Case, Law, LawBroken
from linear_moe.testing import laws as module
from linear_moe.testing.laws import Sizes, Violation
from linear_moe.testing.rule_inputs import draw
from linear_moe.testing.strategies import BORDER_LENGTHS, layer_cases, lengths, rule_cases

ONE, TWO = torch.ones(2, 2), 2 * torch.ones(2, 2)


def test_a_case_prints_as_the_call_that_makes_it() -> None:
    case = Case(GLA, options={"gate_rank": 2}, lengths=(0, 3), head_dim=4, tokens="drawn", seed=7)
    assert repr(case) == "Case(GLA, options={'gate_rank': 2}, lengths=(0, 3), head_dim=4, tokens='drawn', seed=7)"
    assert eval(repr(case), {"Case": Case, "GLA": GLA}) == case
    assert repr(Case(RetNet)) == "Case(RetNet)"


def test_a_case_draws_the_same_each_time() -> None:
    case = Case(GLA, seed=3)
    assert torch.equal(case.randn(4), case.randn(4))
    assert not torch.equal(case.randn(4), case.randn(4, stream=1))
    assert not torch.equal(case.randn(4), Case(GLA, seed=4).randn(4))
    for name, x in draw(case).tensors.items():
        assert torch.equal(x, draw(case).tensors[name]), name


def test_what_the_kinds_of_tokens_are() -> None:
    kinds = {kind: draw(Case(GLA, lengths=(200,), head_dim=3, tokens=kind)) for kind in ("drawn", "extreme")}
    assert not kinds["drawn"].through_rule
    drawn, extreme = (inputs.tensors["log_decay"].exp() for inputs in kinds.values())
    assert drawn.max() == 1
    assert 1e-6 * 0.999 < drawn.min() < 1e-4
    torch.testing.assert_close(extreme.unique(), torch.tensor([1e-6, 1.0], dtype=torch.float64))
    torch.testing.assert_close(kinds["drawn"].tensors["k"].norm(dim=-1), torch.ones(200, 1, dtype=torch.float64))
    keys = kinds["extreme"].tensors["k"][:, 0]
    assert (keys @ keys.T).min() > 0.999


def test_a_broken_law_has_a_name_a_case_and_numbers() -> None:
    law = Law("equal", "one is two", lambda case: module.require_close("one", ONE, TWO))
    with pytest.raises(LawBroken) as error:
        law(Case(GLA))
    assert str(error.value) == (
        "gla breaks the law 'equal': one is two\n"
        "  on: Case(GLA)\n"
        "  measured: one[0, 0] is 1, expected 2 (apart by 1, allowed 2e-10)"
    )


def test_an_error_of_the_code_under_test_breaks_the_law() -> None:
    def check(case: Case) -> None:
        raise KeyError("decay")

    with pytest.raises(LawBroken, match="measured: KeyError: 'decay'") as error:
        Law("runs", "it runs", check)(Case(GLA))
    assert isinstance(error.value.__cause__, KeyError)


def test_an_interrupt_is_no_broken_law() -> None:
    def check(case: Case) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Law("runs", "it runs", check)(Case(GLA))


NAN = torch.tensor([torch.nan])


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: module.require_close("x", ONE, ONE[0]), r"x has shape \[2, 2\], expected \[2\]"),
        (lambda: module.require_close("x", ONE.double() + 1e-9, ONE), r"x\[0, 0\] is 1, expected 1 \(apart by 1e-09"),
        (lambda: module.require_close("x", NAN, NAN), r"x\[0\] is nan"),
        (lambda: module.require_same_bits("x", ONE, ONE.double()), r"x is torch.float32, expected torch.float64"),
        (lambda: module.require_same_bits("x", ONE.double() + 1e-16 * 3, ONE.double()), r"allowed 0"),
        (lambda: module.require_zero("x", ONE * 1e-30), r"x\[0, 0\] is 1e-30, expected 0"),
        (lambda: module.require_finite("x", torch.tensor([1.0, torch.inf])), r"x has 1 of 2 numbers"),
        (lambda: module.require_all_close({"x": ONE}, {"y": ONE}), r"there are \['x'\], expected \['y'\]"),
    ],
)
def test_what_is_required(check: Callable[[], Any], message: str) -> None:
    with pytest.raises(Violation, match=message):
        check()


def test_what_is_allowed() -> None:
    module.require_close("x", ONE.double() + 1e-11, ONE.double())
    module.require_close("x", torch.zeros(0), torch.zeros(0))
    module.require_zero("x", None)
    module.require_zero("x", -torch.zeros(2))
    module.require_same_bits("x", ONE, ONE.clone())


def test_all_laws_have_names_of_their_own_and_say_what_they_state() -> None:
    laws = (*RULE_LAWS, *LAYER_LAWS)
    assert len({law.name for law in laws}) == len(laws)
    for law in laws:
        assert " " in law.statement
        assert law.statement[0].islower() and not law.statement.endswith(".")


def test_lengths_reach_every_border() -> None:
    assert {0, 1, LONGEST_CHUNK - 1, LONGEST_CHUNK, LONGEST_CHUNK + 1} <= set(BORDER_LENGTHS)
    seen: set[tuple[int, ...]] = set()

    @settings(max_examples=300)
    @given(lengths())
    def collect(drawn: tuple[int, ...]) -> None:
        seen.add(drawn)

    collect()
    assert set(BORDER_LENGTHS) <= {length for drawn in seen for length in drawn}
    assert any(len(set(drawn)) == 1 < len(drawn) and drawn[0] for drawn in seen), "equally long ones"
    assert any(0 in drawn and any(drawn) for drawn in seen), "an empty one beside others"


@settings(max_examples=30)
@given(st.data())
def test_sizes_are_kept(data: st.DataObject) -> None:
    sizes = Sizes(tokens=(10, 20), num_heads=(2, 3), head_dim=(4, 5), kinds=("extreme",))
    case = data.draw(rule_cases(GLA, options=[{"gate_rank": 3}], sizes=sizes))
    assert 10 <= sum(case.lengths) <= 20
    assert 2 <= case.num_heads <= 3
    assert case.head_dim in (4, 5) and case.head_value_dim in (4, 5)
    assert (case.tokens, case.options) == ("extreme", {"gate_rank": 3})


@settings(max_examples=30)
@given(st.data())
def test_only_sizes_that_the_rule_takes(data: st.DataObject) -> None:
    assert data.draw(rule_cases(RetNet)).head_dim % 2 == 0
    assert data.draw(rule_cases(Mamba2, options=[{"num_groups": 2}])).num_value_heads % 2 == 0


@settings(max_examples=30)
@given(st.data())
def test_cases_of_layers_have_their_memories(data: st.DataObject) -> None:
    case = data.draw(layer_cases(GLA))
    assert 1 <= case.top_k <= case.num_memories
    assert case.tokens == "rule"
