"""Gated DeltaNet, `model_type` gated_deltanet (2412.06464)."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from linear_moe.models.convert.family import Family, MixerParts, Weights, pack
from linear_moe.models.convert.options import Options
from linear_moe.models.convert.short_conv import conv_width, take_convs

DEFAULTS = {
    "allow_neg_eigval": False,
    "attn": None,
    "conv_size": 4,
    "expand_v": 2.0,
    "head_dim": 256,
    "hidden_size": 2048,
    "num_heads": 6,
    "num_hidden_layers": 21,
    "num_v_heads": None,
    "output_gate_activation": "swish",
    "use_gate": True,
    "use_short_conv": True,
}


class Sizes(NamedTuple):
    """Heads and their channels."""

    num_heads: int
    num_value_heads: int
    head_dim: int
    head_value_dim: int

    @property
    def key_width(self) -> int:
        """Of q and k."""
        return self.num_heads * self.head_dim

    @property
    def value_width(self) -> int:
        """Of v, the gate and the output."""
        return self.num_value_heads * self.head_value_dim


def sizes(options: Options) -> Sizes:
    """The layer's sizes.

    Raises:
        ValueError: if they are no whole numbers, or the value heads no multiple of the key heads.
    """
    heads, head_dim = options.integer("num_heads"), options.integer("head_dim")
    value_heads = options.optional_integer("num_v_heads") or heads
    if value_heads % heads:
        raise options.error("num_v_heads", f"must be a multiple of num_heads = {heads}")
    return Sizes(heads, value_heads, head_dim, whole(options, "expand_v", head_dim))


def whole(options: Options, name: str, of: int) -> int:
    """The option `name` times a size, which must be a whole number."""
    exact = options.number(name) * of
    if round(exact) < 1 or abs(exact - round(exact)) > 1e-5 * exact:
        raise options.error(name, f"must make a whole number of {of} channels")
    return round(exact)


def output_gate(options: Options) -> str:
    """Our `output_gate`."""
    options.only("output_gate_activation", "swish", "silu", "sigmoid")
    if not options.truth("use_gate"):
        return "none"
    return "sigmoid" if options.value("output_gate_activation") == "sigmoid" else "silu"


def mixer(options: Options) -> dict[str, Any]:
    """Our `mixer:` of the options."""
    size = sizes(options)
    rule: dict[str, Any] = {"type": "gated_deltanet"}
    if options.truth("allow_neg_eigval"):
        rule["allow_negative_eigenvalues"] = True
    return {
        "type": "memory",
        "rule": rule,
        "num_heads": size.num_heads,
        "num_value_heads": size.num_value_heads,
        "head_dim": size.head_dim,
        "head_value_dim": size.head_value_dim,
        "conv_width": conv_width(options),
        "output_gate": output_gate(options),
    }


def mixer_tensors(weights: Weights, layer: nn.Module, options: Options) -> dict[str, Tensor]:
    """Our parameters of one layer."""
    size, hidden = sizes(options), options.integer("hidden_size")
    widths = {"q": size.key_width, "k": size.key_width, "v": size.value_width}
    rows = {**widths, "beta": size.num_value_heads, "decay": size.num_value_heads}
    stored = {"beta": "b", "decay": "a"}
    parts = MixerParts(
        {name: [weights.take(f"{stored.get(name, name)}_proj.weight", width, hidden)] for name, width in rows.items()},
        norm=weights.take("o_norm.weight", size.head_value_dim),
        out=weights.take("o_proj.weight", hidden, size.value_width),
        conv=take_convs(weights, options, widths),
        rule={name: weights.take(name, size.num_value_heads) for name in ("A_log", "dt_bias")},
    )
    if output_gate(options) != "none":
        parts.gate = weights.take("g_proj.weight", size.value_width, hidden)
    return pack(layer, parts)


GATED_DELTANET = Family("gated_deltanet", DEFAULTS, mixer, mixer_tensors, dropped=("D",))
