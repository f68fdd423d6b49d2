"""Importing `linear_moe.hf` registers its classes; without transformers it says what to install."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import linear_moe

ROOT = Path(linear_moe.__file__).resolve().parent.parent


def test_the_import_registers_with_the_auto_classes(run_python: Callable[..., str]) -> None:
    code = """
import linear_moe.hf
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("linear_moe", model="recall-mom")
print(type(AutoModelForCausalLM.from_config(config)).__name__, type(config).__name__)
"""
    assert run_python(code, ROOT).strip() == "LinearMoEForCausalLM LinearMoEConfig"


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
