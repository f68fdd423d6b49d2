"""A block's steps beside the scan on kernels of their own: when they run, and what a layer's declaration lets them take.

Of a mixer the router, the plan of the slots, the short convolution with its activation and the rule's l2 norm, and the
weighted, gated sum of a token's reads; around it the residual addition with the norm after it, the feed-forward's gated unit,
and the experts' sum. Where they don't run, PyTorch makes the same numbers.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from linear_moe.forms import GateColumns, GateForms
from linear_moe.layers.norms import GatedRMSNorm
from linear_moe.layers.projections import autocast_dtype
from linear_moe.layers.routing import SlotPlan
from linear_moe.layers.sequences import Sequences
from linear_moe.rules.base import Projection, Tokens, UpdateRule
from linear_moe.rules.scan import TRITON_INSTALLED, TRUSTED_KERNEL_DTYPES

if TYPE_CHECKING:
    from linear_moe.kernels.slot_convs_operator import Mixed

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
    """The parts of a convolution along the memories, of which there may be none, or None where the kernels don't take it."""
    if convolved and conv_width > LARGEST_CONV_WIDTH:
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


class Together(NamedTuple):
    """The parts that one operator makes where nothing is carried, and the gates beside them."""

    by_slot: list[ConvPart]
    """The first columns of the memories' projection."""
    by_token: ConvPart | None
    """All columns of the projection that is made once a token."""
    gates: GateColumns | None
    """All other columns of the memories' projection, if gates of declared forms are made of them."""

    @property
    def parts(self) -> list[ConvPart]:
        return [*self.by_slot, *([] if self.by_token is None else [self.by_token])]


def made_together(
    parts: dict[str, ConvPart] | None,
    memory_projections: Mapping[str, Projection],
    token_projections: Mapping[str, Projection],
    gates: GateForms | None,
    heads: int,
) -> Together | None:
    """What one operator makes of these projections, or None where their first is not convolved.

    `gates` are those of the rule if kernels make them: of so many heads.
    """
    if not parts:
        return None
    names, tokens = list(memory_projections), list(token_projections)
    by_slot = [parts[name] for name in itertools.takewhile(parts.__contains__, names)]
    # Only where that is all of the weight: its gradient is then one tensor.
    all_at_once = len(tokens) == 1 and tokens[0] in parts and len(by_slot) + 1 == len(parts)
    if not all_at_once:
        following = itertools.accumulate(
            (part.width for part in by_slot), initial=by_slot[0].first_channel if by_slot else 0
        )
        by_slot = [part for part, first in zip(by_slot, following, strict=False) if part.first_channel == first]
    if not by_slot:
        return None
    rest, first = names[len(by_slot) :], sum(part.width for part in by_slot)
    found = None
    if gates is not None and rest:
        columns = {name: first + n * heads for n, name in enumerate(rest)}
        decay, strength = (None if form is None else columns.get(form.projection) for form in gates)
        if set(columns.values()) == {decay, strength} - {None}:
            found = GateColumns(decay, strength, heads, 1.0 if gates.beta is None else gates.beta.largest)
    return Together(by_slot, parts[tokens[0]] if all_at_once else None, found)


def conv_runs(parts: dict[str, ConvPart] | None, together: Together | None) -> list[list[ConvPart]]:
    """What is convolved together, in the order of the weight's channels: parts side by side, and each other by itself."""
    runs = [] if together is None else [together.parts]
    taken = [part for run in runs for part in run]
    runs += [[part] for part in (parts or {}).values() if part not in taken]
    return sorted(
        (sorted(run, key=lambda part: part.first_channel) for run in runs), key=lambda run: run[0].first_channel
    )


def normed_by_conv(parts: dict[str, ConvPart] | None) -> bool:
    """Whether queries and keys come out of the convolution with length 1."""
    return parts is not None and all(name in parts and parts[name].norm_heads is not None for name in ("q", "k"))


def gates_are_declared(rule: UpdateRule, normalized: bool) -> bool:
    """Whether the rule's tokens are q, k, v and its `gate_forms`, each of a plain projection of a number a head, and its
    output what the recurrence reads.
    """
    for method in ("gates", "_gated", "output", "normalized_tokens" if normalized else "tokens"):
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
    """The log decay and the strength `[R, H]` of raw projections `[R, H]`, where `gates_are_declared`."""
    from linear_moe.kernels.gates_operator import Decay, Strength, make_gates

    decay, strength = rule.gate_forms()
    if decay is None and strength is None:
        return None, None
    return make_gates(
        decay and Decay(raw[decay.projection], parameters[decay.rate], parameters[decay.shift]),
        strength and Strength(raw[strength.projection], strength.largest),
    )


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
        weight: Tensor | None,
        bias: Tensor | None,
        state: Tensor | None,
        num_states: int,
        runs: list[list[ConvPart]],
    ) -> None:
        """`plan` as the kernels make it, or the identity; `runs` as `conv_runs` makes them."""
        self.plan, self.num_states = plan, num_states
        # One split: the gradient of a range of rows alone would be a copy into zeros. No weight where nothing is convolved.
        first = [run[0].first_channel for run in runs]
        widths = [sum(part.width for part in run) for run in runs]
        self.weights, self.biases = (
            {} if x is None else dict(zip(first, x.split(widths) if len(runs) > 1 else (x,), strict=True))
            for x in (weight, bias)
        )
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

    def of_all(
        self, together: Together, slots: Tensor, tokens: Tensor | None, gates: GateColumns | None,
        rate: Tensor | None, shift: Tensor | None,
    ) -> Mixed:  # fmt: skip
        """What is made together of the memories' projection `[R, *]` and the tokens' one `[S, *]`, where nothing is carried."""
        from linear_moe.kernels.slot_convs_operator import Part, slot_convs

        assert self.state is None
        first = min(part.first_channel for part in together.parts)
        *parts, last = (
            Part(part.width, part.first_channel - first, part.activation, part.norm_heads) for part in together.parts
        )
        return slot_convs(
            slots,
            parts if together.by_token else [*parts, last],
            self.weights[first],
            self.biases.get(first),
            self.plan.cu_seqlens,
            tokens=tokens,
            token_part=last if together.by_token else None,
            source=self.plan.source,
            place=self.place,
            segment=self.plan.segment,
            gates=gates,
            rate=rate,
            shift=shift,
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
