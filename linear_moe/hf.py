"""Hugging Face classes over the language model. Importing this registers them with the Auto classes."""

try:
    import transformers as transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        'transformers is needed for linear_moe.hf and is not installed: pip install "linear-moe[hf]"',
        name="transformers",
    ) from error

from linear_moe.models.hf import BalanceBiasCallback, LinearMoECache, LinearMoEConfig, LinearMoEForCausalLM

__all__ = ["BalanceBiasCallback", "LinearMoECache", "LinearMoEConfig", "LinearMoEForCausalLM"]
