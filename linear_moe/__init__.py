"""Recurrent memory for sequence models: declared linear recurrences, and mixtures of their memories."""

from linear_moe import ops
from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.layers import (
    MemoryLayer,
    MemoryState,
    MoMLayer,
    collect_auxiliary_losses,
    set_auxiliary_scale,
)
from linear_moe.rules import UpdateRule, get_rule, register_rule, rule_names

__version__ = "0.1.0"

__all__ = [
    "Decay",
    "Erase",
    "MemoryLayer",
    "MemoryState",
    "MoMLayer",
    "Recurrence",
    "UpdateRule",
    "__version__",
    "collect_auxiliary_losses",
    "get_rule",
    "ops",
    "register_rule",
    "rule_names",
    "set_auxiliary_scale",
]
