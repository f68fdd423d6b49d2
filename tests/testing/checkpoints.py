"""Checkpoints of small models, without training them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from linear_moe.models import LanguageModel, ModelConfig, build_model
from linear_moe.training.checkpoint import TrainerState, save_checkpoint

MIXTURE = {"type": "mom", "num_heads": 1, "head_dim": 4, "num_memories": 3}
ATTENTION = {"type": "attention", "num_heads": 2}


def small_model(vocab_size: int = 257, *mixers: dict[str, Any], seed: int = 0) -> LanguageModel:
    """A layer of each of `mixers`, a mixture and full attention unless given; weights that make a difference."""
    mixers = mixers or (MIXTURE, ATTENTION)
    blocks = {f"b{i}": {"mixer": mixer, "ffn": {"type": "swiglu", "width": 8}} for i, mixer in enumerate(mixers)}
    torch.manual_seed(seed)
    model = build_model(
        ModelConfig.from_dict(
            {"hidden_size": 8, "vocab_size": vocab_size, "blocks": blocks, "layers": " ".join(blocks), "name": "small"}
        )
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def saved(folder: Path, model: LanguageModel) -> Path:
    """`folder`, with the model's checkpoint in it."""
    save_checkpoint(folder, model, TrainerState(1, *[{} for _ in TrainerState._fields[1:]]))
    return folder
