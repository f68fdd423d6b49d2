"""Models: a YAML configuration, the language model it declares, and what that is made of."""

from linear_moe.models.decoding import DecodeStep
from linear_moe.models.errors import ConfigError, Problem
from linear_moe.models.explain import Explanation, LayerRow, explain
from linear_moe.models.generation import generate
from linear_moe.models.json_schema import json_schema
from linear_moe.models.library import load_config, shipped_configs
from linear_moe.models.model import Block, LanguageModel, build_model
from linear_moe.models.pattern import PatternError, expand_pattern
from linear_moe.models.sampling import Sampling
from linear_moe.models.schema import BlockConfig, ModelConfig
from linear_moe.models.session import Session
from linear_moe.models.state import ModelState

__all__ = [
    "Block",
    "BlockConfig",
    "ConfigError",
    "DecodeStep",
    "Explanation",
    "LanguageModel",
    "LayerRow",
    "ModelConfig",
    "ModelState",
    "PatternError",
    "Problem",
    "Sampling",
    "Session",
    "build_model",
    "expand_pattern",
    "explain",
    "generate",
    "json_schema",
    "load_config",
    "shipped_configs",
]
