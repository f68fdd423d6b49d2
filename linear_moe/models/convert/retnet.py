"""RetNet, `model_type` retnet (2307.08621)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from linear_moe.models.convert.family import Family, Weights, pack
from linear_moe.models.convert.gla import linear_mixer, linear_parts, sizes
from linear_moe.models.convert.options import Options

DEFAULTS = {
    "attn": None,
    "elementwise_affine": True,
    "expand_k": 1.0,
    "expand_v": 2.0,
    "feature_map": None,
    "hidden_ratio": 2,
    "hidden_size": 2048,
    "num_heads": 8,
    "num_hidden_layers": 24,
    "num_kv_heads": None,
    "use_output_gate": True,
}


def mixer(options: Options) -> dict[str, Any]:
    """Our `mixer:` of the options."""
    size = sizes(options)
    if size.head_dim % 2:
        raise options.error("expand_k", f"makes heads of {size.head_dim} channels, of which rotary turns pairs")
    return linear_mixer(options, {"type": "retnet"})


def mixer_tensors(weights: Weights, layer: nn.Module, options: Options) -> dict[str, Tensor]:
    """Our parameters of one layer."""
    return pack(layer, linear_parts(weights, options))


# The peer's model does not hand the two options of a convolution on to its layer.
RETNET = Family("retnet", DEFAULTS, mixer, mixer_tensors, without_effect=("use_short_conv", "conv_size"))
