"""Mixture of Memories of Gated DeltaNet, `model_type` mom (2502.13685), and mom_gated_deltanet of the paper's own code."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from linear_moe.models.convert.family import Family, MixerParts, Weights, pack
from linear_moe.models.convert.gated_deltanet import Sizes, whole
from linear_moe.models.convert.options import Options

DEFAULTS = {
    "attn": None,
    "aux_loss_scale": 0.01,
    "conv_size": 4,
    "expand_v": 1.0,
    "head_dim": 256,
    "hidden_size": 2048,
    "mom_backend": "gated_deltanet",
    "num_heads": 4,
    "num_hidden_layers": 24,
    "num_memories": 4,
    "shared_mem": True,
    "single_kv_proj": False,
    "topk": 2,
    "use_output_gate": True,
    "use_short_conv": True,
}
WITHOUT_EFFECT = ("capacity", "use_layer_wise_balance")
"""Read by nobody. The paper's own code dropped the oldest tokens of a memory beyond its capacity; the peer does not."""


def sizes(options: Options) -> Sizes:
    """The layer's sizes."""
    heads, head_dim = options.integer("num_heads"), options.integer("head_dim")
    return Sizes(heads, heads, head_dim, whole(options, "expand_v", head_dim))


def mixer(options: Options) -> dict[str, Any]:
    """Our `mixer:` of the options."""
    options.only("mom_backend", "gated_deltanet")
    # The peer refuses to build such a layer, or to run it beside attention.
    options.only("use_short_conv", True)
    options.only("attn", None)
    memories, top_k, size = options.integer("num_memories"), options.integer("topk"), sizes(options)
    if top_k > memories:
        raise options.error("topk", f"must be at most num_memories = {memories}")
    if top_k == 1 < memories:
        raise options.error("topk", "can't be represented: its weight would be 1 there, and is the router's score here")
    declared: dict[str, Any] = {
        "type": "mom",
        "rule": "gated_deltanet",
        "num_memories": memories,
        "top_k": top_k,
        "shared_memory": options.truth("shared_mem"),
        "num_heads": size.num_heads,
        "head_dim": size.head_dim,
        "head_value_dim": size.head_value_dim,
        "conv_width": options.integer("conv_size"),
        "output_gate": "silu" if options.truth("use_output_gate") else "none",
        "memory_projections": "shared" if options.truth("single_kv_proj") else "memory",
    }
    scale = options.value("aux_loss_scale")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale < float("inf"):
        raise options.error("aux_loss_scale", "must be a number of at least 0")
    if top_k < memories:
        # A loss that is top_k at balance, once a model, there; one that is 1, once a layer, here.
        declared["balance_weight"] = scale * top_k / options.integer("num_hidden_layers")
    return declared


def mixer_tensors(weights: Weights, layer: nn.Module, options: Options) -> dict[str, Tensor]:
    """Our parameters of one layer."""
    size, hidden, memories = sizes(options), options.integer("hidden_size"), options.integer("num_memories")
    widths = {"q": size.key_width, "k": size.key_width, "v": size.value_width}
    projections = {"q": [weights.take("q_proj.weight", size.key_width, hidden)]}
    rows = {"k": ("k", size.key_width), "v": ("v", size.value_width)}
    rows |= {"beta": ("b", size.num_heads), "decay": ("a", size.num_heads)}
    single, shared = options.truth("single_kv_proj"), options.truth("shared_mem")
    for name, (stored, width) in rows.items():
        own = [] if single else [weights.take(f"{stored}_proj.{m}.weight", width, hidden) for m in range(memories)]
        common = [weights.take(f"shared_{stored}.weight", width, hidden)] if single or shared else []
        projections[name] = own + common
    parts = MixerParts(
        projections,
        norm=weights.take("o_norm.weight", size.head_value_dim),
        out=weights.take("o_proj.weight", hidden, size.value_width),
        router=weights.take("gate.weight", memories, hidden),
        conv={
            name: weights.take_conv(f"{name}_conv1d.weight", width, options.integer("conv_size"))
            for name, width in widths.items()
        },
        rule={name: weights.take(name, size.num_heads) for name in ("A_log", "dt_bias")},
    )
    if options.truth("use_output_gate"):
        parts.gate = weights.take("g_proj.weight", size.value_width, hidden)
    return pack(layer, parts)


MOM = Family("mom", DEFAULTS, mixer, mixer_tensors, without_effect=WITHOUT_EFFECT, dropped=("D",))

PAPERS_MOM = Family(
    "mom_gated_deltanet",
    DEFAULTS | {"expand_v": 2.0, "num_heads": 6, "num_hidden_layers": 21, "num_memories": 8, "shared_mem": False},
    mixer,
    mixer_tensors,
    without_effect=WITHOUT_EFFECT,
    dropped=("D",),
    renamed={"num_experts": "num_memories", "single_expert": "single_kv_proj", "use_gate": "use_output_gate"},
)
