"""Rules: the mathematics of each recurrence, its gates, and the choice of how it is run."""

from linear_moe.rules.base import Parameter, Projection, RuleDims, RuleOutput, Tokens, UpdateRule, option, upcast
from linear_moe.rules.deltanet import DeltaNet
from linear_moe.rules.gated_deltanet import GatedDeltaNet
from linear_moe.rules.gla import GLA
from linear_moe.rules.linear_attention import LinearAttention
from linear_moe.rules.mamba2 import Mamba2
from linear_moe.rules.registry import get_rule, register_rule, rule_names
from linear_moe.rules.retnet import RetNet

__all__ = [
    "GLA",
    "DeltaNet",
    "GatedDeltaNet",
    "LinearAttention",
    "Mamba2",
    "Parameter",
    "Projection",
    "RetNet",
    "RuleDims",
    "RuleOutput",
    "Tokens",
    "UpdateRule",
    "get_rule",
    "option",
    "register_rule",
    "rule_names",
    "upcast",
]
