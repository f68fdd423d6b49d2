"""Mamba2, `model_type` mamba2 of the peer (2405.21060)."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from linear_moe.models.convert.family import Family, MixerParts, Names, Weights, constant, pack
from linear_moe.models.convert.gated_deltanet import whole
from linear_moe.models.convert.options import Options

UNLIMITED = [0.0, float("inf")]
UNLIMITED_IN_JSON = [0.0, {"__float__": "Infinity"}]
"""How transformers 5 writes an infinity."""
DEFAULTS = {
    "D_has_hdim": False,
    "conv_kernel": 4,
    "dt_limit": UNLIMITED,
    "expand": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "n_groups": 1,
    "norm_before_gate": False,
    "norm_eps": 1e-5,
    "num_heads": None,
    "num_hidden_layers": 48,
    "rmsnorm": True,
    "state_size": 128,
    "use_bias": False,
    "use_conv_bias": True,
}
WITHOUT_EFFECT = (
    *("A_init_range", "chunk_size", "conv_init", "dt_init_floor", "dt_max", "dt_min"),
    # The sum is rounded to the model's dtype after every block all the same.
    "residual_in_fp32",
)


class Sizes(NamedTuple):
    """Heads, groups and their channels."""

    num_heads: int
    head_value_dim: int
    state_size: int
    num_groups: int

    @property
    def width(self) -> int:
        """Of x and the gate."""
        return self.num_heads * self.head_value_dim

    @property
    def group_width(self) -> int:
        """Of B and of C."""
        return self.num_groups * self.state_size


def sizes(options: Options) -> Sizes:
    """The layer's sizes.

    Raises:
        ValueError: if they do not divide.
    """
    width, head_dim = whole(options, "expand", options.integer("hidden_size")), options.integer("head_dim")
    if width % head_dim:
        raise options.error("head_dim", f"must divide expand * hidden_size = {width}")
    heads, groups = width // head_dim, options.integer("n_groups")
    if options.optional_integer("num_heads") not in (None, heads):
        raise options.error("num_heads", f"must be expand * hidden_size / head_dim = {heads}")
    if heads % groups:
        raise options.error("n_groups", f"must divide the {heads} heads")
    return Sizes(heads, head_dim, options.integer("state_size"), groups)


def mixer(options: Options) -> dict[str, Any]:
    """Our `mixer:` of the options."""
    options.only("hidden_act", "silu", "swish")
    options.only("use_bias", False)
    options.only("rmsnorm", True)
    options.only("D_has_hdim", False)
    if options.value("dt_limit") not in (UNLIMITED, UNLIMITED_IN_JSON):
        raise options.error("dt_limit", "can't be represented; [0, Infinity] can")
    size = sizes(options)
    return {
        "type": "memory",
        "rule": {"type": "mamba2", "num_groups": size.num_groups},
        "num_heads": size.num_heads,
        "head_dim": size.state_size,
        "head_value_dim": size.head_value_dim,
        "conv_width": options.integer("conv_kernel"),
        "norm_groups": size.num_groups,
        "gate_before_norm": not options.truth("norm_before_gate"),
    }


def mixer_tensors(weights: Weights, layer: nn.Module, options: Options) -> dict[str, Tensor]:
    """Our parameters of one layer."""
    size, hidden, taps = sizes(options), options.integer("hidden_size"), options.integer("conv_kernel")
    widths = [size.width, size.group_width, size.group_width]
    rows = [size.width, *widths, size.num_heads]
    gate, x, b, c, dt = weights.take("in_proj.weight", sum(rows), hidden).split(rows)
    names = ("x", "B", "C")
    conv = weights.take_conv("conv1d.weight", sum(widths), taps).split(widths)
    biased = options.truth("use_conv_bias")
    bias = weights.take("conv1d.bias", sum(widths)) if biased else constant(0, sum(widths))
    parts = MixerParts(
        {"x": [x], "B": [b], "C": [c], "dt": [dt]},
        norm=weights.take("norm.weight", size.width),
        out=weights.take("out_proj.weight", hidden, size.width),
        gate=gate,
        conv=dict(zip(names, conv, strict=True)),
        conv_bias=dict(zip(names, bias.split(widths), strict=True)),
        rule={name: weights.take(name, size.num_heads) for name in ("A_log", "dt_bias", "D")},
    )
    return pack(layer, parts)


MAMBA2 = Family(
    "mamba2",
    DEFAULTS,
    mixer,
    mixer_tensors,
    Names(backbone="backbone", mixer_norm="norm", mixer="mixer", ffn_norm=None, final_norm="norm_f"),
    WITHOUT_EFFECT,
)
