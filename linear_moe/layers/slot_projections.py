"""A layer's slots projected and convolved by kernels: what is multiplied together, and what is convolved together."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from linear_moe.layers.kernel_steps import SlotConv, conv_runs
from linear_moe.layers.projections import Routes, plain_linear, project, routes_are_taken
from linear_moe.layers.routing import SlotPlan
from linear_moe.layers.short_conv import activate
from linear_moe.layers.slots import gather_tokens

if TYPE_CHECKING:
    from linear_moe.layers.recurrent_mixer import RecurrentMixer


class Projected(NamedTuple):
    """What the tokens' slots are projected and convolved to."""

    raw: dict[str, Tensor]
    """`[R, width]` by name, without those that gates were made of."""
    gates: tuple[Tensor | None, Tensor | None] | None
    """The log decay and the strength `[R, H]`, if they are made."""
    conv_state: Tensor | None
    gate: Tensor | None
    """`[S, H * V]` the output's, if it is made."""


def project_and_convolve(
    layer: RecurrentMixer,
    tokens: Tensor,
    plan: SlotPlan,
    cu_memories: Tensor,
    fan_out: int,
    conv_state: Tensor | None,
    covered: bool,
    shared: bool,
) -> Projected:
    """The projections with their convolution, activation and norm made by kernels: what a token's slots share is made once
    a token and read through the plan.

    Args:
        layer: whose matrices and convolution they are.
        tokens: `[S, D]`.
        plan: of the R slots.
        cu_memories: `[M + 1]` where each memory's slots begin.
        fan_out: slots a token.
        conv_state: `[B, M, W, C]` the inputs before these of the convolution along the memories, or None.
        covered: whether it is known that every slot is a memory's.
        shared: whether it is known that the last memory has every token.
    """
    assert layer.conv_parts is not None
    together = layer.together if conv_state is None else None
    runs = layer.conv_runs if conv_state is None else conv_runs(layer.conv_parts, None)
    weight, bias = (layer.conv_weight, layer.conv_bias) if layer.convolved else (None, None)
    conv = SlotConv(plan, fan_out, weight, bias, conv_state, layer.num_states, runs)
    raw: dict[str, Tensor] = {}
    routes = None
    if layer.memory_weight is not None and conv.place is not None:
        assert plan.source is not None and plan.ends is not None
        place = conv.place if covered else torch.where(conv.place < plan.cu_seqlens[-1], conv.place, -1)
        routes = Routes(plan.ends, plan.source, place, shared)
    by_group = (
        layer.memory_weight is not None and routes is not None and not routes_are_taken(tokens, layer.memory_weight)
    )
    gate_proj = plain_linear(layer.gate_proj) if layer.kernel_combines else None
    made = project(
        tokens,
        None if by_group else layer.memory_weight,
        layer.token_weight,
        None if gate_proj is None else gate_proj.weight,
        routes,
    )
    projected = made.slots
    # What it leaves in rows of no memory is anything: the convolution reads none of them.
    loose = projected is not None and routes is not None and not covered
    if by_group:
        assert layer.memory_weight is not None
        gathered = gather_tokens(tokens, plan, fan_out, kernel=True)
        projected = layer._memory_linear(gathered, layer.memory_weight, cu_memories, covered)
    names, token_names, gates = list(layer.memory_projections), list(layer.token_projections), None
    if together is not None:
        assert projected is not None
        by_token = together.by_token is not None
        # Of rows of no memory gates could be anything, too.
        own_gates = None if loose else together.gates
        rate, shift = (None, None) if own_gates is None else _decay_parameters(layer)
        mixed = conv.of_all(together, projected, made.tokens if by_token else None, own_gates, rate, shift)
        raw |= dict(zip((part.name for part in together.parts), mixed.parts, strict=True))
        names = names[len(together.by_slot) :] if own_gates is None else []
        token_names = [] if by_token else token_names
        projected, gates = mixed.rest, None if own_gates is None else (mixed.log_decay, mixed.beta)
    if projected is not None:
        widths = [layer.memory_projections[name].first_width for name in names]
        raw |= dict(zip(names, projected.split(widths, -1), strict=True))
        for name in names:
            if layer._convolves(name):
                raw[name] = conv.of(layer.conv_parts[name], raw[name], by_token=False)
            elif loose:
                slots = torch.arange(plan.order.shape[0], device=tokens.device)
                raw[name] = torch.where((slots < plan.cu_seqlens[-1])[:, None], raw[name], 0)
    if token_names:
        assert made.tokens is not None
        widths = [spec.first_width for spec in layer.token_projections.values()]
        # Of a split into one part the gradient would be a copy.
        columns = made.tokens.split(widths, -1) if len(widths) > 1 else (made.tokens,)
        for name, column in zip(token_names, columns, strict=True):
            if layer._convolves(name):
                raw[name] = conv.of(layer.conv_parts[name], column, by_token=True)
            else:
                raw[name] = gather_tokens(column, plan, fan_out, kernel=True)
    for name in raw:
        if not layer._convolves(name):
            value = layer._finish(name, raw[name], cu_memories, covered)
            raw[name] = activate(value, layer.activations[name])
    return Projected(raw, gates, conv.carried(), made.gate)


def _decay_parameters(layer: RecurrentMixer) -> tuple[Tensor | None, Tensor | None]:
    """The rate and the shift of a declared log decay."""
    decay = layer.rule.gate_forms().log_decay
    if decay is None:
        return None, None
    return layer.gate_parameters.get_parameter(decay.rate), layer.gate_parameters.get_parameter(decay.shift)
