"""Gated linear attention, `model_type` gla (2312.06635)."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from linear_moe.models.convert.family import Family, MixerParts, Weights, constant, pack, repeat_heads
from linear_moe.models.convert.gated_deltanet import whole
from linear_moe.models.convert.options import Options
from linear_moe.models.convert.short_conv import take_convs

DEFAULTS = {
    "attn": None,
    "clamp_min": None,
    "conv_size": 4,
    "elementwise_affine": True,
    "expand_k": 0.5,
    "expand_v": 1.0,
    "feature_map": None,
    "hidden_size": 2048,
    "num_heads": 4,
    "num_hidden_layers": 24,
    "num_kv_heads": None,
    "use_output_gate": True,
    "use_short_conv": False,
}
GATE_RANK = 16
"""Not an option of the peer's configuration, as the divisor of the decay's logarithm, also 16, is none."""


class Sizes(NamedTuple):
    """Heads and their channels; keys and values may have fewer, each serving several queries."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_value_dim: int

    @property
    def copies(self) -> int:
        """Queries that share a key."""
        return self.num_heads // self.num_kv_heads


def sizes(options: Options) -> Sizes:
    """The layer's sizes.

    Raises:
        ValueError: if they are no whole numbers or do not divide.
    """
    heads, hidden = options.integer("num_heads"), options.integer("hidden_size")
    kv_heads = options.optional_integer("num_kv_heads") or heads
    if heads % kv_heads:
        raise options.error("num_kv_heads", f"must divide num_heads = {heads}")
    dims = []
    for name in ("expand_k", "expand_v"):
        width = whole(options, name, hidden)
        if width % heads:
            raise options.error(name, f"must make a width that num_heads = {heads} divides, not {width}")
        dims.append(width // heads)
    return Sizes(heads, kv_heads, *dims)


def linear_mixer(options: Options, rule: dict[str, Any]) -> dict[str, Any]:
    """Our `mixer:` of the options that GLA and RetNet have in common."""
    options.only("feature_map", None)
    size = sizes(options)
    return {
        "type": "memory",
        "rule": rule,
        "num_heads": size.num_heads,
        "head_dim": size.head_dim,
        "head_value_dim": size.head_value_dim,
        "output_gate": "silu" if options.truth("use_output_gate") else "none",
    }


def linear_parts(weights: Weights, options: Options) -> MixerParts:
    """The weights that GLA and RetNet have in common."""
    size, hidden = sizes(options), options.integer("hidden_size")
    value_width = size.num_heads * size.head_value_dim
    gated = options.truth("use_output_gate")

    def shared(name: str, head_width: int) -> list[Tensor]:
        stored = weights.take(f"{name}_proj.weight", size.num_kv_heads * head_width, hidden)
        return [repeat_heads(stored, size.num_kv_heads, size.copies)]

    norm = constant(1, size.head_value_dim)
    if options.truth("elementwise_affine"):
        # The two names are of one norm, with its gate fused into the kernel or not.
        fused = "g_norm_swish_gate.weight"
        norm = weights.take(fused if weights.has(fused) else "g_norm.weight", size.head_value_dim)
    return MixerParts(
        {
            "q": [weights.take("q_proj.weight", size.num_heads * size.head_dim, hidden)],
            "k": shared("k", size.head_dim),
            "v": shared("v", size.head_value_dim),
        },
        norm=norm,
        out=weights.take("o_proj.weight", hidden, value_width),
        gate=weights.take("g_proj.weight", value_width, hidden) if gated else None,
    )


def mixer(options: Options) -> dict[str, Any]:
    """Our `mixer:` of the options."""
    options.only("clamp_min", None)
    rule: dict[str, Any] = {"type": "gla", "gate_rank": GATE_RANK}
    width = options.integer("conv_size")
    if not options.truth("use_short_conv"):
        return linear_mixer(options, rule)
    return linear_mixer(options, rule | {"short_conv": True}) | {"conv_width": width}


def mixer_tensors(weights: Weights, layer: nn.Module, options: Options) -> dict[str, Tensor]:
    """Our parameters of one layer."""
    size, hidden = sizes(options), options.integer("hidden_size")
    parts = linear_parts(weights, options)
    key_width = size.num_kv_heads * size.head_dim
    parts.projections["decay"] = [weights.take("gk_proj.0.weight", GATE_RANK, hidden)]
    second = weights.take("gk_proj.1.weight", key_width, GATE_RANK)
    parts.second_stage["decay"] = [repeat_heads(second, size.num_kv_heads, size.copies)]
    parts.bias["decay"] = [repeat_heads(weights.take("gk_proj.1.bias", key_width), size.num_kv_heads, size.copies)]
    if options.truth("use_short_conv"):
        widths = {
            "q": size.num_heads * size.head_dim,
            "k": key_width,
            "v": size.num_kv_heads * size.head_value_dim,
        }
        parts.conv = take_convs(weights, options, widths)
        for name in ("k", "v"):
            parts.conv[name] = repeat_heads(parts.conv[name], size.num_kv_heads, size.copies)
    return pack(layer, parts)


GLA = Family("gla", DEFAULTS, mixer, mixer_tensors, without_effect=("use_gk", "use_gv"))
