"""What every family has around its mixers: embeddings, norms, feed-forwards, the head, and attention layers of hybrids."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from linear_moe.layers.attention import SoftmaxAttention
from linear_moe.layers.feed_forward import SwiGLU
from linear_moe.models.convert.family import Family, Weights
from linear_moe.models.convert.options import Options
from linear_moe.models.convert.source import SourceFolder
from linear_moe.models.convert.transformer import ATTENTION_DEFAULTS, attention, attention_tensors
from linear_moe.models.model import Block, LanguageModel
from linear_moe.models.schema import ModelConfig

DEFAULTS = {
    "attnres_block_size": None,
    "norm_eps": 1e-6,
    "norm_first": False,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
FEED_FORWARD_DEFAULTS = {"hidden_act": "swish", "hidden_ratio": 4, "intermediate_size": None}
RECALL = "recall"
"""Our name of a hybrid's attention blocks."""


def read_options(family: Family, source: SourceFolder) -> Options:
    """The options of a checkpoint, by the names and defaults of its family."""
    feed_forward = {} if family.names.ffn_norm is None else FEED_FORWARD_DEFAULTS
    data = {family.renamed.get(name, name): value for name, value in source.config.items()}
    defaults = {**DEFAULTS, **feed_forward, **family.defaults}
    return Options(data, defaults, source.config_path, family.without_effect)


def read_config(family: Family, options: Options, name: str) -> ModelConfig:
    """Our configuration of a checkpoint.

    Raises:
        ValueError: naming the option that can't be represented.
    """
    # Norms inside the projections, of an early release: other names, and other numbers where eps is not 1e-5.
    options.only("norm_first", False)
    options.only("attnres_block_size", None)
    hidden, num_layers = options.integer("hidden_size"), options.integer("num_hidden_layers")
    ffn = _feed_forward(options) if family.names.ffn_norm is not None else {"type": "none"}
    mixer = family.mixer(options)
    own = "attention" if mixer["type"] == "attention" else "memory"
    blocks = {own: {"mixer": mixer, "ffn": ffn}}
    layers = [own] * num_layers
    for index, (recall, places) in enumerate(_attention(family, options, hidden, num_layers)):
        block = RECALL if index == 0 else f"{RECALL}_{index + 1}"
        blocks[block] = {"mixer": recall, "ffn": ffn}
        for place in places:
            layers[place] = block
    declared = {
        "name": name,
        "description": f"Converted from a checkpoint of type {family.model_type}.",
        "hidden_size": hidden,
        "vocab_size": options.integer("vocab_size"),
        "blocks": {block: blocks[block] for block in blocks if block in layers},
        "layers": _pattern(layers),
        "tie_embeddings": options.truth("tie_word_embeddings"),
        "norm_eps": options.number("norm_eps"),
    }
    return ModelConfig.from_dict(declared, source="the configuration made of " + options.source)


def read_tensors(family: Family, options: Options, source: SourceFolder, model: LanguageModel) -> dict[str, Tensor]:
    """Our parameters by name, of a `model` on the meta device.

    Raises:
        ValueError: naming a tensor that is missing, of another shape, or left over.
    """
    names, hidden = family.names, model.config.hidden_size
    table = (model.config.vocab_size, hidden)
    embeddings = f"{names.backbone}.embeddings.weight"
    tensors = {
        "embedding.weight": source.take(embeddings, table),
        "norm.weight": source.take(f"{names.backbone}.{names.final_norm}.weight", (hidden,)),
    }
    head = "lm_head.weight"
    if not model.config.tie_embeddings:
        if not source.has(head) and not options.given("tie_word_embeddings"):
            raise ValueError(f"{str(source.folder)!r} has no {head}, and tie_word_embeddings is not in its config.json")
        tensors["head.weight"] = source.take(head, table)
    elif source.has(head) and not source.take(head, table).equal(tensors["embedding.weight"]):
        raise ValueError(f"{str(source.folder)!r}: {head} is not {embeddings}, though tie_word_embeddings = true")
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        prefix = f"{names.backbone}.layers.{index}"
        weights = Weights(source, f"{prefix}.{names.mixer}")
        own = {"mixer_norm.weight": source.take(f"{prefix}.{names.mixer_norm}.weight", (hidden,))}
        if isinstance(block.mixer, SoftmaxAttention):
            mixer = attention_tensors(weights, block.mixer)
        else:
            mixer = family.mixer_tensors(weights, block.mixer, options)
            for name in family.dropped:
                source.drop(f"{weights.prefix}.{name}")
        own |= {f"mixer.{name}": tensor for name, tensor in mixer.items()}
        if isinstance(block.ffn, SwiGLU):
            own["ffn_norm.weight"] = source.take(f"{prefix}.{names.ffn_norm}.weight", (hidden,))
            feed_forward = _feed_forward_tensors(Weights(source, f"{prefix}.{names.ffn}"), block.ffn)
            own |= {f"ffn.{name}": tensor for name, tensor in feed_forward.items()}
        tensors |= {f"blocks.{index}.{name}": tensor for name, tensor in own.items()}
    return tensors


def _feed_forward(options: Options) -> dict[str, Any]:
    options.only("hidden_act", "swish", "silu")
    width = options.optional_integer("intermediate_size")
    ratio = 4.0 if options.value("hidden_ratio") is None else options.number("hidden_ratio")
    return {"type": "swiglu", "ratio": ratio} if width is None else {"type": "swiglu", "width": width}


def _feed_forward_tensors(weights: Weights, layer: SwiGLU) -> dict[str, Tensor]:
    """Our parameters of a feed-forward. Early releases stored the gate and what it gates as one matrix, as ours is."""
    hidden, width = layer.hidden_size, layer.width
    if weights.has("up_proj.weight"):
        parts = [weights.take(f"{name}_proj.weight", width, hidden) for name in ("gate", "up")]
        both = parts[0].new_empty(2 * width, hidden)
        both[:width], both[width:] = parts
    else:
        both = weights.take("gate_proj.weight", 2 * width, hidden)
    return {"in_proj.weight": both, "out_proj.weight": weights.take("down_proj.weight", hidden, width)}


def _attention(
    family: Family, options: Options, hidden: int, num_layers: int
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """The attention blocks of a hybrid: our `mixer:` of each kind, and the layers that are of it."""
    declared = options.value("attn") if "attn" in family.defaults else None
    if declared is None:
        return
    kinds = [declared] if isinstance(declared, dict) else declared
    seen: set[int] = set()
    if not isinstance(kinds, list) or not all(isinstance(kind, dict) for kind in kinds):
        raise options.error("attn", "must be null, a mapping or a list of mappings")
    for kind in kinds:
        own = Options(kind, ATTENTION_DEFAULTS | {"num_heads": None, "layers": None}, f"{options.source}: attn")
        places = own.value("layers")
        inside = isinstance(places, list) and all(type(p) is int and 0 <= p < num_layers for p in places)
        if not inside or len(set(places)) < len(places) or seen & set(places):
            raise own.error("layers", f"must list layers from 0 to {num_layers - 1}, each once")
        seen |= set(places)
        mixer = attention(own, hidden)
        if unknown := own.unknown():
            name, hint = next(iter(unknown.items()))
            raise ValueError(f"{own.source}: unknown key {name}; {hint}".rstrip("; "))
        if places:
            yield mixer, places


def _pattern(layers: list[str]) -> str:
    """Our `layers:` of the block of each layer."""
    runs = [(block, len(list(group))) for block, group in itertools.groupby(layers)]
    return " ".join(block if count == 1 else f"{block}*{count}" for block, count in runs)
