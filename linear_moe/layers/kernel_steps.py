"""A block's steps beside the scan on kernels of their own: when they run, and what a layer's declaration lets them take.

Of a mixer the router, the plan of the slots, the short convolution with its activation and the rule's l2 norm, and the
weighted, gated sum of a token's reads; around it the residual addition with the norm after it, the feed-forward's gated unit,
and the experts' sum. Where they don't run, PyTorch makes the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from linear_moe.layers.norms import GatedRMSNorm
from linear_moe.layers.projections import autocast_dtype
from linear_moe.layers.routing import SlotPlan
from linear_moe.layers.sequences import Sequences
from linear_moe.rules.base import Projection, Tokens, UpdateRule
from linear_moe.rules.scan import TRITON_INSTALLED, TRUSTED_KERNEL_DTYPES

LARGEST_CONV_WIDTH = 8
LARGEST_HEAD = 256
LARGEST_NORM = 8192
"""Channels of the residual stream."""


def kernels_run(x: Tensor, impl: str) -> bool:
    """Whether a layer that was built for `impl` takes these kernels for the input `x`."""
    if impl not in ("auto", "triton") or not TRITON_INSTALLED:
        return False
    dtype = autocast_dtype(x)
    if x.device.type == "cuda":
        trusted = TRUSTED_KERNEL_DTYPES if impl == "auto" else (torch.float32, torch.bfloat16, torch.float16)
        return dtype in trusted and x.dtype != torch.float64
    # In the interpreter only by name: it is for tests.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return impl == "triton" and interpreted and x.device.type == "cpu" and dtype in (torch.float32, torch.float16)


def plan_of(memory: Tensor, sequences: Sequences, num_states: int) -> SlotPlan:
    """`sort_slots` of the slots `memory` `[S, F]`: tokens come sequence by sequence, so a count by memory sorts them."""
    from linear_moe.kernels.mixing import plan_slots

    plan = plan_slots(memory, sequences.index, num_states, sequences.num_sequences)
    return SlotPlan(plan.order, plan.place, plan.cu_seqlens, source=plan.source, segment=plan.segment, ends=plan.ends)


class ConvPart(NamedTuple):
    """One projection's part in the convolution."""

    name: str
    first_channel: int
    """Of the convolution's weight."""
    width: int
    activation: str | None
    norm_heads: int | None
    """Channels of a head that an l2 norm follows on."""

    @property
    def channels(self) -> slice:
        """Of the convolution's weight and of its carried inputs."""
        return slice(self.first_channel, self.first_channel + self.width)


def conv_parts(
    declared: dict[str, Projection], convolved: list[str], conv_width: int, head_dim: int, normalizes: bool
) -> dict[str, ConvPart] | None:
    """The parts of a convolution along the memories, or None where the kernels don't take it."""
    if not convolved or conv_width > LARGEST_CONV_WIDTH:
        return None
    parts, first = {}, 0
    for name in convolved:
        spec = declared[name]
        if spec.rank is not None or spec.bias:
            return None
        norm = head_dim if normalizes and name in ("q", "k") else None
        parts[name] = ConvPart(name, first, spec.width, spec.activation, norm)
        first += spec.width
    return parts


def leading_parts(parts: dict[str, ConvPart] | None, projections: Iterable[str]) -> list[ConvPart]:
    """The first of `projections`, one after another, that are convolved and share an activation."""
    leading: list[ConvPart] = []
    for name in projections:
        part = None if parts is None else parts.get(name)
        if part is None or (leading and part.activation != leading[0].activation):
            break
        leading.append(part)
    return leading


def conv_runs(parts: dict[str, ConvPart] | None, leading: list[ConvPart]) -> list[list[ConvPart]]:
    """What is convolved together, in the order of the weight's channels: the `leading` parts, and each other by itself."""
    runs = [leading] if leading else []
    runs += [[part] for part in (parts or {}).values() if part not in leading]
    return sorted(runs, key=lambda run: run[0].first_channel)


def normed_by_conv(parts: dict[str, ConvPart] | None) -> bool:
    """Whether queries and keys come out of the convolution with length 1."""
    return parts is not None and all(name in parts and parts[name].norm_heads is not None for name in ("q", "k"))


def gates_are_declared(rule: UpdateRule, normalized: bool) -> bool:
    """Whether the rule's tokens are q, k, v and its `gate_forms`, each of a plain projection of a number a head."""
    for method in ("gates", "_gated", "normalized_tokens" if normalized else "tokens"):
        if getattr(type(rule), method) is not getattr(UpdateRule, method):
            return False
    declared = rule.projections()
    for form in rule.gate_forms():
        if form is not None:
            spec = declared[form.projection]
            plain = spec.rank is None and not (spec.bias or spec.conv or spec.activation)
            if not plain or spec.width != rule.dims.num_value_heads:
                return False
    decay = rule.gate_forms().log_decay
    return decay is None or not any(rule.parameters()[name].per_memory for name in (decay.rate, decay.shift))


def gates_of(
    rule: UpdateRule, raw: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """The log decay and the strength `[1, R, H]` of raw projections `[1, R, H]`, where `gates_are_declared`."""
    from linear_moe.kernels.gates_operator import Decay, Strength, make_gates

    decay, strength = rule.gate_forms()
    if decay is None and strength is None:
        return None, None
    made = make_gates(
        decay and Decay(raw[decay.projection][0], parameters[decay.rate], parameters[decay.shift]),
        strength and Strength(raw[strength.projection][0], strength.largest),
    )
    log_decay, beta = (None if gate is None else gate[None] for gate in made)
    return log_decay, beta


def made_tokens(
    rule: UpdateRule,
    raw: Mapping[str, Tensor],
    log_decay: Tensor | None,
    beta: Tensor | None,
    positions: Tensor | None = None,
) -> Tokens:
    """What `UpdateRule.tokens` makes, with gates that are made; what `normalized_tokens` does, without positions."""
    dims = rule.dims
    q, k = (raw[name].unflatten(-1, (dims.num_heads, dims.head_dim)) for name in ("q", "k"))
    if positions is not None:
        q, k = rule.qk_transform(q, k, positions)
    v = raw["v"].unflatten(-1, (dims.num_value_heads, dims.head_value_dim))
    return Tokens(q, k, v, log_decay, beta)


class SlotConv:
    """The short convolution of one call: a part at a time, or neighbouring columns of one projection together."""

    def __init__(
        self,
        plan: SlotPlan,
        fan_out: int,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        num_states: int,
        runs: list[list[ConvPart]],
    ) -> None:
        """`plan` as the kernels make it, or the identity; `runs` as `conv_runs` makes them."""
        self.plan, self.num_states = plan, num_states
        # One split: the gradient of a range of rows alone would be a copy into zeros.
        first = [run[0].first_channel for run in runs]
        widths = [sum(part.width for part in run) for run in runs]
        self.weights = dict(zip(first, weight.split(widths), strict=True))
        self.biases = {} if bias is None else dict(zip(first, bias.split(widths), strict=True))
        self.place = None if plan.identity else plan.place.view(-1, fan_out)
        self.state = None if state is None else state.transpose(0, 1).flatten(0, 1)
        self._carried: dict[int, Tensor] = {}

    def of(self, part: ConvPart, x: Tensor, *, by_token: bool) -> Tensor:
        """One projection `[R, width]`, or `[S, width]` where it was made once a token: `[R, width]`."""
        from linear_moe.kernels.slot_conv_operator import slot_conv

        mixed, carried = slot_conv(
            x,
            self.weights[part.first_channel],
            self.biases.get(part.first_channel),
            self.plan.cu_seqlens,
            source=self.plan.source if by_token else None,
            place=self.place if by_token else None,
            segment=self.plan.segment,
            state=None if self.state is None else self.state[..., part.channels],
            activation=part.activation,
            norm_heads=part.norm_heads,
            return_state=self.state is not None,
        )
        if carried is not None:
            self._carried[part.first_channel] = carried
        return mixed

    def of_columns(self, parts: list[ConvPart], x: Tensor) -> tuple[Tensor, ...]:
        """The first columns of a projection `[R, *]`, and the rest as it is. Only without carried inputs."""
        from linear_moe.kernels.slot_conv_columns import column_convs

        assert self.state is None
        return column_convs(
            x,
            self.weights[parts[0].first_channel],
            self.biases.get(parts[0].first_channel),
            self.plan.cu_seqlens,
            [part.width for part in parts],
            [part.norm_heads for part in parts],
            activation=parts[0].activation,
            segment=self.plan.segment,
        )

    def carried(self) -> Tensor | None:
        """The new carried inputs `[B, M, W, C]` in the layout of a layer's state; None where there were none."""
        if self.state is None:
            return None
        whole = torch.cat([self._carried[first] for first in sorted(self._carried)], -1)
        return whole.unflatten(0, (self.num_states, -1)).transpose(0, 1)


def combines(norm: GatedRMSNorm, head_value_dim: int) -> bool:
    """Whether the kernel has this output norm."""
    return norm.gate == "silu" and norm.groups is None and not norm.gate_first and head_value_dim <= LARGEST_HEAD
