"""`check_rule` lets right rules pass, and says in words which law a wrong one breaks, on a small input."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import rules_outside as rules
import torch
from torch import Tensor

from linear_moe import UpdateRule, get_rule, rule_names
from linear_moe.rules import GatedDeltaNet, Tokens
from linear_moe.testing import LAYER_LAWS, RULE_LAWS, LawBroken, RuleReport, check_rule


@pytest.mark.parametrize("name", rule_names())
def test_every_registered_rule_passes(name: str) -> None:
    report = check_rule(get_rule(name), max_examples=2)
    assert not report.left_out
    assert set(report.examples) == {law.name for law in (*RULE_LAWS, *LAYER_LAWS)}
    assert all(tried > 0 for tried in report.examples.values())
    assert str(report).startswith(f"{name} keeps {len(report.examples)} laws on ")


def test_options_are_those_of_the_rule() -> None:
    check_rule(GatedDeltaNet, options={"allow_negative_eigenvalues": True, "short_conv": False}, max_examples=1)


def test_a_declared_rule_of_ones_own_passes() -> None:
    assert not check_rule(rules.ChannelDelta, max_examples=4).left_out


def test_a_rule_of_a_step_alone_passes() -> None:
    """Laws of a form are left out, and said to be."""
    report = check_rule(rules.Momentum, max_examples=4)
    assert set(report.left_out) == {law.name for law in RULE_LAWS if not law.applies(rules.Momentum)}
    assert {"step-is-declared-form", "chunked-equals-recurrent", "float32-budget"} <= set(report.left_out)
    assert "left out: " in str(report)
    assert {"recurrent-is-step", "causal", "gradients-are-derivatives", "layer-definition"} <= set(report.examples)


BROKEN = [
    (
        rules.DecayAfterWrite,
        "step-is-declared-form",
        r"step contradicts the declared form \(scalar decay, none erase\)",
    ),
    (
        rules.FormLies,
        "step-is-declared-form",
        r"step contradicts the declared form \(scalar decay, none erase\): the state",
    ),
    (rules.FormWithoutItsGate, "tokens-in-range", r"log_decay .* is missing, while the declared form \(scalar decay"),
    (rules.Growing, "tokens-in-range", r"log_decay of float64 projections is \d.*, expected at most 0"),
    (rules.Underflowing, "tokens-in-range", r"log_decay of float\d\d projections a hundred times as large has \d+ of"),
    (rules.NarrowGates, "tokens-in-range", r"log_decay of bfloat16 projections is torch\.bfloat16, expected float32"),
    (rules.LooksAhead, "causal", r"the gradient of outputs before token 1 for q from it on"),
    (rules.LooksBack, "causal", r"the gradient of outputs of the last sequence for k of the others"),
    (rules.InPlace, "recurrent-is-step", r"the state that step was given, after the call,"),
    (rules.Narrow, "recurrent-is-step", r"step in float64 gave torch\.float32"),
    (rules.Detached, "gradients-are-derivatives", r"gradcheck of q, k, v, log_decay, initial_state"),
    (rules.Normalized, "finite", r"output \(recurrent, float32\) has \d+ of \d+ numbers that are not finite"),
    (rules.Random, "tokens-in-range", r"k of float64 projections, made again,\["),
    (rules.Raises, "tokens-in-range", r"RuntimeError: three tokens are too many"),
]


@pytest.mark.parametrize(("rule", "law", "measured"), BROKEN, ids=[rule.__name__ for rule, _, _ in BROKEN])
def test_a_broken_rule_is_told_so(rule: type[UpdateRule], law: str, measured: str) -> None:
    with pytest.raises(LawBroken, match=measured) as error:
        check_rule(rule)
    broken = error.value
    assert broken.law == law
    message = str(broken)
    assert message.startswith(f"{rule.__name__} breaks the law '{law}': ")
    assert broken.statement in message
    # Small enough to be followed by hand.
    assert sum(broken.case.lengths) <= 3
    assert broken.case.num_heads == 1
    # Its repr makes the same case again.
    assert repr(broken.case) in message
    assert eval(repr(broken.case), {"Case": type(broken.case), rule.__name__: rule}) == broken.case


def test_it_is_deterministic() -> None:
    """The same search finds the same, whatever state the generators are in."""
    messages = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        with pytest.raises(LawBroken) as error:
            check_rule(rules.FormLies)
        messages.add(str(error.value))
    assert len(messages) == 1
    assert check_rule(rules.Fading, max_examples=1) == check_rule(rules.Fading, max_examples=1)


def test_it_leaves_the_generators_alone() -> None:
    before = torch.get_rng_state()
    check_rule(rules.Fading, max_examples=1)
    assert torch.equal(torch.get_rng_state(), before)


@dataclass(frozen=True)
class WideOnly(rules.Fading):
    """Takes no heads but of 32 channels."""

    def __post_init__(self) -> None:
        if self.dims.head_dim != 32:
            raise ValueError(f"head_dim must be 32, got {self.dims.head_dim}")


def test_a_rule_may_be_picky_about_sizes() -> None:
    assert isinstance(check_rule(WideOnly, max_examples=1), RuleReport)


@dataclass(frozen=True)
class Unbuildable(rules.Fading):
    """Takes no sizes."""

    def __post_init__(self) -> None:
        raise ValueError("no")


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"rule must be a subclass of UpdateRule, got 'gla'"):
        check_rule("gla")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"max_examples must be at least 1, got 0"):
        check_rule(rules.Fading, max_examples=0)
    with pytest.raises(ValueError, match=r"Unbuildable can't be built with options \{\}: no"):
        check_rule(Unbuildable)
    with pytest.raises(ValueError, match=r"Fading can't be built with options \{'colour': 1\}: .*colour"):
        check_rule(rules.Fading, options={"colour": 1})


def test_without_hypothesis_the_extra_is_named() -> None:
    """The rest of linear_moe.testing works without it."""
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "from linear_moe.testing import check_rule, assert_within_budget\n"
        "from linear_moe.rules import GLA\n"
        "try: check_rule(GLA)\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "check_rule needs hypothesis: pip install 'linear-moe[testing]'"


def test_a_step_may_be_a_method_or_static() -> None:
    @dataclass(frozen=True)
    class AsMethod(rules.Fading):
        """The same, with self."""

        def step(self, state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return rules.Fading.step(state, token)

    check_rule(AsMethod, max_examples=1)
