"""Small models of every kind of state, with weights that make a difference."""

from __future__ import annotations

import torch

from linear_moe.models import LanguageModel, ModelConfig, build_model

BLOCKS = """\
hidden_size: 16
vocab_size: 11
blocks:
  mixture: {mixer: {type: mom, num_heads: 2, head_dim: 4, num_memories: 3}, ffn: {type: swiglu, width: 8}}
  near: {mixer: {type: attention, num_heads: 2, window: 3}, ffn: {type: moe, num_experts: 3, width: 8}}
  far: {mixer: {type: attention, num_heads: 2, num_kv_heads: 1}, ffn: {type: none}}
"""
PATTERNS = {"memories": "mixture mixture", "window": "mixture near", "full": "mixture near far"}


def model_of(
    pattern: str, *, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0, for_kernels: bool = False
) -> LanguageModel:
    """A model of the layers that `pattern` names; `for_kernels` in sizes that every kernel takes."""
    used = ("hidden_size", "vocab_size", "blocks", *pattern.split())
    lines = [line for line in BLOCKS.splitlines() if line.split(":")[0].strip() in used]
    text = "\n".join([*lines, f"layers: {pattern}"])
    if for_kernels:
        for small, large in (
            ("hidden_size: 16", "hidden_size: 32"),
            ("head_dim: 4", "head_dim: 16"),
            ("width: 8", "width: 16"),
        ):
            text = text.replace(small, large)
    torch.manual_seed(seed)
    model = build_model(ModelConfig.from_yaml(text), dtype=dtype, device=device)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()
