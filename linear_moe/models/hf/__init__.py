"""The one language model behind the classes of Hugging Face transformers. Imported through `linear_moe.hf`."""

from transformers import AutoConfig, AutoModelForCausalLM

from linear_moe.models.hf.cache import LinearMoECache
from linear_moe.models.hf.config import LinearMoEConfig
from linear_moe.models.hf.model import LinearMoEForCausalLM

AutoConfig.register(LinearMoEConfig.model_type, LinearMoEConfig)
AutoModelForCausalLM.register(LinearMoEConfig, LinearMoEForCausalLM)

__all__ = ["LinearMoECache", "LinearMoEConfig", "LinearMoEForCausalLM"]
