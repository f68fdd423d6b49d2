"""The laws of a rule, in the order in which a broken one is best told what is wrong with it."""

from __future__ import annotations

from linear_moe.testing.laws import Law
from linear_moe.testing.rule_declaration_laws import DECLARATION_LAWS
from linear_moe.testing.rule_number_laws import FINITE_LAW, NUMBER_LAWS
from linear_moe.testing.rule_scan_laws import SCAN_LAWS

RULE_LAWS: tuple[Law, ...] = (*DECLARATION_LAWS, FINITE_LAW, *SCAN_LAWS, *NUMBER_LAWS)
