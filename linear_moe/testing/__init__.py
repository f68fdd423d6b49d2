"""For those who write a rule or an implementation of one: the laws it has to keep, and the budget of its errors."""

from linear_moe.testing.budget import Budget, assert_within_budget, error_budget
from linear_moe.testing.check_rule import RuleReport, check_rule
from linear_moe.testing.laws import Case, Law, LawBroken
from linear_moe.testing.layer_laws import LAYER_LAWS
from linear_moe.testing.mom_reference import mom_reference
from linear_moe.testing.rule_laws import RULE_LAWS

__all__ = [
    "LAYER_LAWS",
    "RULE_LAWS",
    "Budget",
    "Case",
    "Law",
    "LawBroken",
    "RuleReport",
    "assert_within_budget",
    "check_rule",
    "error_budget",
    "mom_reference",
]
