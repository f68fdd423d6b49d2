"""What a family of checkpoints declares, and what its converters share: packing weights into our fused matrices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linear_moe.layers.recurrent_mixer import RecurrentMixer
from linear_moe.models.convert.options import Options
from linear_moe.models.convert.source import SourceFolder


class Names(NamedTuple):
    """How a family calls the parts of its models."""

    backbone: str = "model"
    mixer_norm: str = "attn_norm"
    mixer: str = "attn"
    ffn_norm: str | None = "mlp_norm"
    """None for blocks without a feed-forward, and then `ffn` is not used."""
    ffn: str = "mlp"
    final_norm: str = "norm"


USUAL_NAMES = Names()


class Weights(NamedTuple):
    """The tensors under one prefix of a checkpoint."""

    source: SourceFolder
    prefix: str

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name and shape; ValueError if it is not there or not of that shape."""
        return self.source.take(f"{self.prefix}.{name}", shape)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return self.source.has(f"{self.prefix}.{name}")

    def take_conv(self, name: str, channels: int, width: int) -> Tensor:
        """The weight `[C, W]` of a depthwise convolution, stored as `[C, 1, W]`."""
        return self.take(name, channels, 1, width)[:, 0]


@dataclass(frozen=True)
class Family:
    """A kind of checkpoints, by the `model_type` of its configuration."""

    model_type: str
    defaults: Mapping[str, Any]
    """The options that are read, with the values that the peer's class has without them."""
    mixer: Callable[[Options], dict[str, Any]]
    """Options to our `mixer:`. Raises ValueError for what can't be represented."""
    mixer_tensors: Callable[[Weights, nn.Module, Options], dict[str, Tensor]]
    """The peer's weights of one mixer to our parameters, by name; the module is ours, on the meta device."""
    names: Names = USUAL_NAMES
    without_effect: Collection[str] = ()
    """Further options that the peer does not compute with."""
    dropped: Collection[str] = ()
    """Tensors of a mixer that some releases store and none computes with."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """An older release's names of options to those of `defaults`."""


@dataclass
class MixerParts:
    """The weights of a recurrent layer, each by the name that the rule gives its projection."""

    projections: dict[str, list[Tensor]]
    """`[width or rank, D]`: one for all memories, or one a memory, the shared one last."""
    norm: Tensor
    out: Tensor
    gate: Tensor | None = None
    router: Tensor | None = None
    second_stage: dict[str, list[Tensor]] = field(default_factory=dict)
    """`[width, rank]` of projections through a bottleneck."""
    bias: dict[str, list[Tensor]] = field(default_factory=dict)
    conv: dict[str, Tensor] = field(default_factory=dict)
    """`[width, W]`"""
    conv_bias: dict[str, Tensor] = field(default_factory=dict)
    rule: dict[str, Tensor] = field(default_factory=dict)
    """The rule's own parameters."""


def pack(layer: nn.Module, parts: MixerParts) -> dict[str, Tensor]:
    """Our parameters of `layer` from its parts: what one matrix holds is in the layer's own order."""
    assert isinstance(layer, RecurrentMixer)
    tensors = {"norm.weight": parts.norm, "out_proj.weight": parts.out}
    if parts.gate is not None:
        tensors["gate_proj.weight"] = parts.gate
    if parts.router is not None:
        tensors["router.weight"] = parts.router
    if layer.memory_projections:
        names = list(layer.memory_projections)
        rows = [torch.cat([parts.projections[name][m] for name in names]) for m in range(layer.num_states)]
        tensors["memory_weight"] = torch.stack(rows)
    if layer.token_projections:
        tensors["token_weight"] = torch.cat([parts.projections[name][0] for name in layer.token_projections])
    for kind, stacks in (("second_stage", parts.second_stage), ("projection_bias", parts.bias)):
        tensors |= {f"{kind}.{name}": torch.stack(stack) for name, stack in stacks.items()}
    if layer.convolved:
        tensors["conv_weight"] = torch.cat([parts.conv[name] for name in layer.convolved])
    if layer.conv_bias is not None:
        tensors["conv_bias"] = torch.cat([parts.conv_bias[name] for name in layer.convolved])
    return tensors | {f"gate_parameters.{name}": tensor for name, tensor in parts.rule.items()}


def constant(value: int, *shape: int) -> Tensor:
    """A tensor of what the peer has no parameter for. Of whole numbers, which every floating-point dtype holds."""
    return torch.full(shape, value, dtype=torch.int8)


def repeat_heads(tensor: Tensor, num_heads: int, copies: int) -> Tensor:
    """`[num_heads * C, ...]` to `[num_heads * copies * C, ...]`: each head `copies` times in a row.

    Heads of keys and values that several queries share, written out: the same function, with the state that the peer keeps.
    """
    return tensor.unflatten(0, (num_heads, -1)).repeat_interleave(copies, 0).flatten(0, 1)
