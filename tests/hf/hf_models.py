"""Small models behind the classes of transformers, wide enough apart that no likeliest token is a tie."""

from __future__ import annotations

from typing import Any

import torch

from linear_moe.hf import LinearMoEConfig, LinearMoEForCausalLM
from linear_moe.models import ModelConfig

VOCAB = 23
_BLOCKS = {
    "mom": "{mixer: {type: mom, num_heads: 2, head_dim: 4, num_memories: 3}, ffn: {type: swiglu, width: 8}}",
    "gla": "{mixer: {type: mom, rule: {type: gla, gate_rank: 2}, num_heads: 1, head_dim: 4, num_memories: 3, "
    "learned_initial_memory: true}, ffn: {type: none}}",
    "one": "{mixer: {type: memory, rule: retnet, num_heads: 1, head_dim: 4, conv_scope: sequence}, "
    "ffn: {type: moe, num_experts: 3, width: 8, z_loss_weight: 0.01}}",
    "full": "{mixer: {type: attention, num_heads: 2, num_kv_heads: 1}, ffn: {type: swiglu, width: 8}}",
    "near": "{mixer: {type: attention, num_heads: 2, window: 3}, ffn: {type: none}}",
    "biased": "{mixer: {type: mom, num_heads: 1, head_dim: 4, num_memories: 3, balance_bias_rate: 0.1, "
    "balance_weight: 0.0}, ffn: {type: none}}",
}
KINDS = {"mom": "mom mom", "memories": "mom gla one", "hybrid": "mom full near"}
"""Mixtures alone, every kind of memory, and a hybrid with attention, full and over a window."""


def declare(layers: str = "mom", **options: Any) -> ModelConfig:
    names = sorted(set(layers.split()))
    blocks = "\n".join(f"  {name}: {_BLOCKS[name]}" for name in names)
    declared = ModelConfig.from_yaml(f"hidden_size: 16\nvocab_size: {VOCAB}\nblocks:\n{blocks}\nlayers: {layers}\n")
    return ModelConfig.from_dict(declared.model_dump(mode="json", exclude_unset=True) | options)


def make(layers: str = "mom", *, dtype: torch.dtype = torch.float32, std: float = 0.4, **options: Any) -> Any:
    model = LinearMoEForCausalLM(LinearMoEConfig(model=declare(layers, **options)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model.to(dtype).eval()


def draw(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length))


def pad(texts: list[torch.Tensor], side: str = "left", pad_token: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask` of texts of several lengths."""
    longest = max(len(text) for text in texts)
    tokens = torch.full((len(texts), longest), pad_token)
    mask = torch.zeros_like(tokens)
    for row, text in enumerate(texts):
        place = slice(longest - len(text), None) if side == "left" else slice(len(text))
        tokens[row, place], mask[row, place] = text, 1
    return tokens, mask
