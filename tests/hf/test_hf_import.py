"""Importing `linear_moe.hf` registers its classes; without transformers it says what to install."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import linear_moe.hf
from linear_moe.models import build_model

ROOT = Path(linear_moe.__file__).resolve().parent.parent


def test_the_import_registers_with_the_auto_classes() -> None:
    config = AutoConfig.for_model("linear_moe", model="recall-mom")
    assert type(config) is linear_moe.hf.LinearMoEConfig
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert type(model) is linear_moe.hf.LinearMoEForCausalLM
    expected = build_model(config.declaration(), dtype=torch.bfloat16).state_dict()
    assert {name: tensor.dtype for name, tensor in model.model.state_dict().items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }


def test_every_public_name_is_there() -> None:
    assert {name for name in linear_moe.hf.__all__ if hasattr(linear_moe.hf, name)} == set(linear_moe.hf.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'LinearMoE'"):
        linear_moe.hf.LinearMoE  # noqa: B018


def test_without_transformers_it_says_what_to_install(run_python: Callable[..., str]) -> None:
    code = """
import sys
sys.modules["transformers"] = None
try:
    import linear_moe.hf
except ImportError as error:
    print(error)
"""
    expected = 'transformers is needed for linear_moe.hf and is not installed: pip install "linear-moe[hf]"'
    assert run_python(code, ROOT).strip() == expected
