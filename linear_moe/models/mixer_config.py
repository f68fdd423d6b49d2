"""`mixer:` in a block: what mixes the tokens of a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field, PositiveInt
from torch import nn

from linear_moe.layers.attention import SoftmaxAttention
from linear_moe.layers.memory import MemoryLayer
from linear_moe.layers.mom import MoMLayer
from linear_moe.models.errors import Problem
from linear_moe.models.rule_config import STRICT, RuleConfig
from linear_moe.rules.base import RuleDims, UpdateRule

NonNegative = Annotated[float, Field(ge=0)]


class BuildContext(NamedTuple):
    """What a part of a model is built with, beside its own configuration."""

    hidden_size: int
    norm_eps: float
    layer_index: int
    num_layers: int
    impl: str = "auto"
    auxiliary: str = "attach"
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None


class _RecurrentConfig(BaseModel):
    """What a layer of one memory and a mixture of memories have in common."""

    model_config = STRICT

    rule: RuleConfig = Field(
        default=RuleConfig(type="gated_deltanet"),
        description="The update rule of a memory: its name, or a mapping such as {type: gla, gate_rank: 16}.",
    )
    num_heads: PositiveInt = Field(default=4, description="Key heads H.")
    head_dim: PositiveInt = Field(default=256, description="K, the key channels of a head.")
    head_value_dim: PositiveInt | None = Field(
        default=None, description="V, the value channels of a head; K unless given."
    )
    num_value_heads: PositiveInt | None = Field(
        default=None,
        description="Heads of the values and the state, a multiple of num_heads, which is what it is unless given.",
    )
    conv_width: PositiveInt = Field(default=4, description="Taps of the short convolution.")
    conv_scope: Literal["memory", "sequence"] = Field(
        default="memory",
        description='"memory": along the tokens of each memory, on the projections where the rule asks for it; '
        '"sequence": x + SiLU(conv(x)) on the layer\'s input, for any rule.',
    )
    output_gate: Literal["silu", "sigmoid", "none"] = Field(
        default="silu", description="What the gate on the output goes through; none for no gate."
    )
    norm_groups: PositiveInt | None = Field(
        default=None,
        description="How many parts the value channels of all heads are normed in, with a weight a channel; each head by "
        "itself, with one weight for all, unless given.",
    )
    gate_before_norm: bool = Field(
        default=False, description="Norm what the gate has been multiplied with, as Mamba2 does, not the read alone."
    )

    def rule_dims(self, hidden_size: int, layer_index: int = 0, num_layers: int = 1) -> RuleDims:
        """The sizes that the rule is built with."""
        return RuleDims(
            hidden_size=hidden_size,
            num_heads=self.num_heads,
            num_value_heads=self.num_value_heads or self.num_heads,
            head_dim=self.head_dim,
            head_value_dim=self.head_value_dim or self.head_dim,
            layer_index=layer_index,
            num_layers=num_layers,
        )

    def problems(self, hidden_size: int) -> Iterator[Problem]:
        """Options that don't go together or would be ignored; paths are below the mixer."""
        if self.num_value_heads is not None and self.num_value_heads % self.num_heads:
            message = f"must be a multiple of num_heads = {self.num_heads}, got {self.num_value_heads}"
            yield Problem("num_value_heads", message)
            return
        try:
            rule = self.rule.build(self.rule_dims(hidden_size))
        except ValueError as error:
            yield Problem("rule", str(error))
            return
        yield from self._conv_problems(rule)
        width = rule.dims.num_value_heads * rule.dims.head_value_dim
        if self.norm_groups is not None and width % self.norm_groups:
            yield Problem("norm_groups", f"must divide the {width} value channels, got {self.norm_groups}")
        if self.gate_before_norm and self.output_gate == "none":
            yield Problem("gate_before_norm", "would be ignored: output_gate is none")

    def _conv_problems(self, rule: UpdateRule) -> Iterator[Problem]:
        if self.conv_scope == "sequence" or any(projection.conv for projection in rule.projections().values()):
            return
        for name in ("conv_width", "conv_scope"):
            if name in self.model_fields_set:
                remedies = ["conv_scope: sequence, which works with any rule"]
                if "short_conv" in type(rule).__dataclass_fields__:
                    remedies.append(f"rule: {{type: {self.rule.type}, short_conv: true}}")
                message = (
                    f"would be ignored: the rule {self.rule.type!r} has no short convolution here; remove it, or set "
                    f"{' or '.join(remedies)}"
                )
                yield Problem(name, message)

    def _arguments(self, context: BuildContext) -> dict[str, Any]:
        return {
            "hidden_size": context.hidden_size,
            "rule": self.rule.type,
            "rule_options": self.rule.options,
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "head_value_dim": self.head_value_dim,
            "num_value_heads": self.num_value_heads,
            "conv_width": self.conv_width,
            "conv_scope": self.conv_scope,
            "norm_eps": context.norm_eps,
            "output_gate": self.output_gate,
            "norm_groups": self.norm_groups,
            "gate_before_norm": self.gate_before_norm,
            "layer_index": context.layer_index,
            "num_layers": context.num_layers,
            "impl": context.impl,
            "device": context.device,
            "dtype": context.dtype,
        }


class MemoryConfig(_RecurrentConfig):
    """One memory: a linear recurrence as it is published."""

    type: Literal["memory"] = Field(description="One memory.")

    def build(self, context: BuildContext) -> nn.Module:
        """The layer."""
        return MemoryLayer(**self._arguments(context))

    def summary(self) -> str:
        """A few words for a table."""
        return f"{self.rule.type}, {_heads(self)}"


class MoMConfig(_RecurrentConfig):
    """A mixture of memories: a router picks a few of them for each token."""

    type: Literal["mom"] = Field(description="A mixture of memories.")
    num_memories: PositiveInt = Field(default=4, description="M, the shared memory not counted.")
    top_k: PositiveInt = Field(default=2, description="Memories picked a token, at most num_memories.")
    shared_memory: bool = Field(
        default=True, description="One more memory that every token updates and reads with weight 1."
    )
    memory_projections: Literal["memory", "shared"] = Field(
        default="memory",
        description='Keys, values and gates: "memory": one projection a memory; "shared": one for all.',
    )
    query_projection: Literal["shared", "memory"] = Field(default="shared", description="The same for queries.")
    router_score: Literal["softmax", "sigmoid"] = Field(default="softmax", description="How logits become scores.")
    renormalize: bool = Field(
        default=True,
        description="Whether the picked weights are made to sum to 1. With one picked of several they never are.",
    )
    balance_weight: NonNegative = Field(
        default=0.01,
        description="Coefficient of this layer's load-balance loss, which is 1 at balance. "
        "A model-wide coefficient c of the paper's code is c * top_k / number of layers here.",
    )
    z_loss_weight: NonNegative = Field(default=0.0, description="Coefficient of the router's z-loss.")
    balance_bias_rate: NonNegative = Field(
        default=0.0, description="Step of the selection bias that balances without a loss; 0 for none."
    )
    learned_initial_memory: bool = Field(default=False, description="Start from learned states instead of zeros.")

    def problems(self, hidden_size: int) -> Iterator[Problem]:
        """Options that don't go together or would be ignored; paths are below the mixer."""
        yield from super().problems(hidden_size)
        yield from router_problems(self, "num_memories", self.num_memories)

    def build(self, context: BuildContext) -> nn.Module:
        """The layer."""
        return MoMLayer(
            **self._arguments(context),
            num_memories=self.num_memories,
            top_k=self.top_k,
            shared_memory=self.shared_memory,
            memory_projections=self.memory_projections,
            query_projection=self.query_projection,
            router_score=self.router_score,
            renormalize=self.renormalize,
            balance_weight=self.balance_weight,
            z_loss_weight=self.z_loss_weight,
            balance_bias_rate=self.balance_bias_rate,
            learned_initial_memory=self.learned_initial_memory,
            auxiliary=context.auxiliary,
        )

    def summary(self) -> str:
        """A few words for a table."""
        shared = " + shared" if self.shared_memory else ""
        return f"mom of {self.rule.type}, {self.top_k} of {self.num_memories}{shared}, {_heads(self)}"


class AttentionConfig(BaseModel):
    """Softmax attention with rotary positions, full or over a sliding window."""

    model_config = STRICT

    type: Literal["attention"] = Field(description="Softmax attention.")
    num_heads: PositiveInt = Field(default=8, description="Query heads.")
    num_kv_heads: PositiveInt | None = Field(
        default=None, description="Heads of keys and values, a divisor of num_heads, which is what it is unless given."
    )
    head_dim: PositiveInt | None = Field(
        default=None, description="Channels of a head, even; hidden_size / num_heads unless given."
    )
    window: PositiveInt | None = Field(
        default=None, description="Tokens that a token sees, itself included; all before it unless given."
    )
    rope_base: Annotated[float, Field(gt=1)] = Field(
        default=10000.0, description="Longest rotary wavelength over 2 pi."
    )
    max_length: PositiveInt | None = Field(
        default=None, description="Tokens that a sequence may have; a longer one is refused. No limit unless given."
    )

    def problems(self, hidden_size: int) -> Iterator[Problem]:
        """Options that don't go together; paths are below the mixer."""
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            yield Problem("num_kv_heads", f"must divide num_heads = {self.num_heads}, got {self.num_kv_heads}")
        if self.head_dim is not None and self.head_dim % 2:
            yield Problem("head_dim", f"must be even (rotary turns pairs of channels), got {self.head_dim}")
        if self.head_dim is None and hidden_size % (2 * self.num_heads):
            message = (
                f"hidden_size / num_heads must be an even number where no head_dim is given, "
                f"got {hidden_size} / {self.num_heads}"
            )
            yield Problem("num_heads", message)

    def build(self, context: BuildContext) -> nn.Module:
        """The layer."""
        return SoftmaxAttention(
            context.hidden_size,
            self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            window=self.window,
            rope_base=self.rope_base,
            max_length=self.max_length,
            layer_index=context.layer_index,
            device=context.device,
            dtype=context.dtype,
        )

    def summary(self) -> str:
        """A few words for a table."""
        groups = f" of {self.num_kv_heads} kv" if self.num_kv_heads not in (None, self.num_heads) else ""
        return f"attention, {self.num_heads} heads{groups}" + (f", window {self.window}" if self.window else "")


MixerConfig = Annotated[MoMConfig | MemoryConfig | AttentionConfig, Field(discriminator="type")]


def router_problems(config: Any, choice: str, num_choices: int) -> Iterator[Problem]:
    """What is wrong with the routing options of a mixture of `num_choices`."""
    top_k, given = config.top_k, config.model_fields_set
    if top_k > num_choices:
        default = "" if "top_k" in given else " (its default)"
        yield Problem("top_k", f"must be at most {choice} = {num_choices}, got {top_k}{default}")
        return
    if top_k == num_choices:
        for name in ("balance_weight", "balance_bias_rate"):
            if name in given and getattr(config, name) > 0:
                message = (
                    f"would be ignored: top_k = {choice} = {num_choices}, so the load is even whatever the router says"
                )
                yield Problem(name, message)
    elif top_k == 1 and "renormalize" in given and config.renormalize:
        message = (
            f"would be ignored: with top_k = 1 of {num_choices} the weight stays the score itself, or the router would "
            "learn nothing"
        )
        yield Problem("renormalize", message)


def _heads(config: _RecurrentConfig) -> str:
    key, value = config.head_dim, config.head_value_dim or config.head_dim
    heads = config.num_value_heads or config.num_heads
    return f"{heads} heads of {key}" + (f" x {value}" if value != key else "")
