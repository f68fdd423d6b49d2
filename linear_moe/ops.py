"""The rules' recurrences as plain functions of transformed tensors: no conv, norm, rotary or feature map inside."""

from linear_moe.rules.base import RuleOutput
from linear_moe.rules.deltanet import deltanet
from linear_moe.rules.gated_deltanet import gated_deltanet
from linear_moe.rules.gla import gla
from linear_moe.rules.linear_attention import linear_attention
from linear_moe.rules.mamba2 import mamba2
from linear_moe.rules.retnet import retnet

__all__ = ["RuleOutput", "deltanet", "gated_deltanet", "gla", "linear_attention", "mamba2", "retnet"]
