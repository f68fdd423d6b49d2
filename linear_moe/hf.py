"""Hugging Face classes over the language model. Importing this registers them with the Auto classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import transformers as transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    message = 'transformers is needed for linear_moe.hf and is not installed: pip install "linear-moe[hf]"'
    raise ImportError(message, name="transformers") from error

from linear_moe.models.hf import LinearMoECache, LinearMoEConfig, LinearMoEForCausalLM

if TYPE_CHECKING:
    from linear_moe.models.hf.callback import BalanceBiasCallback

__all__ = ["BalanceBiasCallback", "LinearMoECache", "LinearMoEConfig", "LinearMoEForCausalLM"]


def __getattr__(name: str) -> Any:
    # transformers' Trainer, and with it peft, is imported for seconds: only where it is used.
    if name == "BalanceBiasCallback":
        from linear_moe.models.hf.callback import BalanceBiasCallback

        return BalanceBiasCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
