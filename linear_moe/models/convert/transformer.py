"""Softmax attention: the plain Transformer, `model_type` transformer, and the attention layers of hybrids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linear_moe.layers.attention import SoftmaxAttention
from linear_moe.models.convert.family import Family, Weights
from linear_moe.models.convert.options import Options

ATTENTION_DEFAULTS = {"num_kv_heads": None, "qkv_bias": False, "rope_theta": 10000.0, "window_size": None}
DEFAULTS = ATTENTION_DEFAULTS | {
    "hidden_size": 2048,
    "num_heads": 32,
    "num_hidden_layers": 24,
    "qk_norm": False,
}


def attention(options: Options, hidden: int) -> dict[str, Any]:
    """Our `mixer:` of the peer's attention over `hidden` channels.

    Raises:
        ValueError: naming what can't be represented.
    """
    options.only("qkv_bias", False)
    heads, kv_heads = options.integer("num_heads"), options.optional_integer("num_kv_heads")
    if hidden % (2 * heads):
        raise options.error("num_heads", f"must make heads of an even number of the {hidden} channels")
    if kv_heads is not None and heads % kv_heads:
        raise options.error("num_kv_heads", f"must divide num_heads = {heads}")
    base = options.number("rope_theta")
    if base <= 1:
        raise options.error("rope_theta", "must be above 1")
    declared: dict[str, Any] = {"type": "attention", "num_heads": heads, "rope_base": float(base)}
    if kv_heads not in (None, heads):
        declared["num_kv_heads"] = kv_heads
    window = options.optional_integer("window_size")
    return declared if window is None else declared | {"window": window}


def attention_tensors(weights: Weights, layer: nn.Module) -> dict[str, Tensor]:
    """Our parameters of one attention layer."""
    assert isinstance(layer, SoftmaxAttention)
    hidden = layer.hidden_size
    heads = {"q": layer.num_heads, "k": layer.num_kv_heads, "v": layer.num_kv_heads}
    qkv = [weights.take(f"{name}_proj.weight", count * layer.head_dim, hidden) for name, count in heads.items()]
    out = weights.take("o_proj.weight", hidden, layer.num_heads * layer.head_dim)
    return {"qkv_proj.weight": torch.cat(qkv), "out_proj.weight": out}


def mixer(options: Options) -> dict[str, Any]:
    """Our `mixer:` of the options."""
    options.only("qk_norm", False)
    return attention(options, options.integer("hidden_size"))


def mixer_tensors(weights: Weights, layer: nn.Module, options: Options) -> dict[str, Tensor]:
    """Our parameters of one layer."""
    return attention_tensors(weights, layer)


TRANSFORMER = Family("transformer", DEFAULTS, mixer, mixer_tensors, without_effect=("elementwise_affine",))
