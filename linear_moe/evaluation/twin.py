"""The softmax-attention model of the same size: what a model of memories is measured against."""

from __future__ import annotations

from typing import Any

from linear_moe.models.model import build_model
from linear_moe.models.schema import ModelConfig

HEAD_DIM = 64
"""Channels of an attention head, where the width allows it."""


def attention_twin(config: ModelConfig) -> ModelConfig:
    """`config` with full softmax attention in place of every memory, mixture of memories and window.

    The feed-forwards of those layers are made wider or narrower, and where that is not enough the heads narrower, so that a
    token uses as many parameters as before, as nearly as whole widths allow. Mixtures of experts stay as they are.

    Raises:
        ValueError: if the width can't be cut into heads.
    """
    heads = _num_heads(config.hidden_size)
    data = config.model_dump(mode="json", exclude_unset=True)
    data["name"] = f"{config.name or 'model'}-attention"
    for name, block in data["blocks"].items():
        mixer = block["mixer"]
        if mixer["type"] == "attention" and mixer.get("window") is None:
            continue
        wanted = _active(config, name)
        block["mixer"] = {"type": "attention", "num_heads": heads}
        if block.get("ffn", {"type": "swiglu"})["type"] == "moe":
            continue
        block["ffn"] = {"type": "none"}
        missing = wanted - _active(_alone(data, name), name)
        # Three matrices, and the norm before them.
        width = round((missing - config.hidden_size) / (3 * config.hidden_size))
        if width >= 1:
            block["ffn"] = {"type": "swiglu", "width": width}
        elif missing < 0:
            block["mixer"] = _narrowed(config.hidden_size, heads, missing)
    return ModelConfig.from_dict(data)


def _num_heads(hidden_size: int) -> int:
    """As many heads as leave each an even number of channels, `HEAD_DIM` at least if it can be."""
    fitting = [h for h in range(1, hidden_size // 2 + 1) if hidden_size % (2 * h) == 0]
    if not fitting:
        raise ValueError(f"hidden_size = {hidden_size} must be even for attention")
    return max((h for h in fitting if hidden_size // h >= HEAD_DIM), default=1)


def _narrowed(hidden_size: int, heads: int, missing: int) -> dict[str, Any]:
    """Attention of `heads` whole heads, with as many parameters more as `missing` says, which is below 0."""
    # Four matrices: of queries, keys, values and the output.
    channels = max(hidden_size + missing / (4 * hidden_size), 2)
    heads = min(heads, max(int(channels) // HEAD_DIM, 1))
    return {"type": "attention", "num_heads": heads, "head_dim": max(2 * round(channels / heads / 2), 2)}


def _alone(data: dict[str, Any], name: str) -> ModelConfig:
    """A model of one block."""
    return ModelConfig.from_dict({**data, "blocks": {name: data["blocks"][name]}, "layers": name})


def _active(config: ModelConfig, name: str) -> int:
    """Parameters of one of its blocks that a token uses."""
    alone = _alone(config.model_dump(mode="json", exclude_unset=True), name)
    return build_model(alone, device="meta").num_active_parameters()
