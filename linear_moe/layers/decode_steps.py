"""One token of each sequence through a memory layer: the pipeline of `recurrent_mixer` in a few launches, without gradients.

x -> router -> the projections of the picked memories -> short conv, norm, gates -> the rule's recurrence, in place -> combine

Between two tokens nothing has to be sorted: slot f of token s stays at s * F + f, and a slot's state is row b * M + m of the
layer's. What a token costs is to read the weights and the states of the memories that it picked, and to write those states.

Not every layer takes it: `plan_decoding` says which, from the layer's declaration, and `decodes` in which calls. The rest take
the pipeline of any length, which makes the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.layers.kernel_steps import (
    LARGEST_CONV_WIDTH,
    LARGEST_HEAD,
    gates_are_declared,
    kernels_run,
    made_tokens,
)
from linear_moe.layers.projections import autocast_dtype, plain_linear
from linear_moe.layers.sequences import Sequences
from linear_moe.layers.short_conv import activate
from linear_moe.layers.state import MemoryState
from linear_moe.rules.base import upcast
from linear_moe.static_tensors import static

if TYPE_CHECKING:
    from linear_moe.kernels.decode_tokens import Conv, Gates
    from linear_moe.layers.recurrent_mixer import RecurrentMixer

FEW_TOKENS = 16
"""Up to so many, `out_proj` is a product of rows with tokens as the projections are: 64 programs read its weight at D 1024. A
library's matmul of one row may split it and add up in a second launch; from more rows on it has tiles for them."""


class Columns(NamedTuple):
    """Where a projection's first columns stand, and what becomes of them: the fields of the kernel's `Part`."""

    by_token: bool
    column: int
    width: int
    channel: int
    silu: bool
    head: int


@dataclass(frozen=True)
class Decoding:
    """What of a layer's declaration a decoded token needs."""

    parts: dict[str, Columns]
    """Of every projection but the gates that a kernel makes."""
    unfinished: frozenset[str]
    """Projections that a second matrix or a bias follows, and then the activation."""
    normalized: bool
    """Whether queries and keys come out with length 1."""
    decay: Columns | None
    """Of the projection of a decay that a kernel makes."""
    strength: Columns | None
    """Of that of a delta write's strength."""
    gates: bool
    """Whether the rule's tokens are q, k, v and what gates a kernel makes."""


def plan_decoding(layer: RecurrentMixer) -> Decoding | None:
    """How a layer decodes, or None where its declaration is not one that the kernels have.

    Without them: rules without a form or with states of more than 256 rows; convolutions of more than 8 taps, and those behind
    a projection of low rank or with a bias.
    """
    rule, declared = layer.rule, layer.memory_projections | layer.token_projections
    if rule.form is None or rule.state_shape()[0] > LARGEST_HEAD:
        return None
    if layer.conv_weight is not None and layer.conv_width > LARGEST_CONV_WIDTH:
        return None
    if any(declared[name].rank is not None or declared[name].bias for name in layer.convolved):
        return None
    channels, first = {}, 0
    for name in layer.convolved:
        channels[name], first = first, first + declared[name].width
    unfinished = frozenset(name for name, spec in declared.items() if spec.rank is not None or spec.bias)
    # Both or none: whoever norms the other norms them both.
    normalized = (
        rule.normalizes_qk and rule.dims.head_dim <= LARGEST_HEAD and {"q", "k"} <= declared.keys() - unfinished
    )
    parts = {}
    for by_token, projections in ((False, layer.memory_projections), (True, layer.token_projections)):
        column = 0
        for name, spec in projections.items():
            width = spec.width if spec.rank is None else spec.rank
            silu = name not in unfinished and spec.activation == "silu"
            head = rule.dims.head_dim if normalized and name in ("q", "k") else 0
            parts[name] = Columns(by_token, column, width, channels.get(name, -1), silu, head)
            column += width
    if not gates_are_declared(rule, normalized):
        return Decoding(parts, unfinished, normalized, None, None, False)
    made = [form.projection for form in rule.gate_forms() if form is not None]
    decay, strength = (None if form is None else parts[form.projection] for form in rule.gate_forms())
    parts = {name: columns for name, columns in parts.items() if name not in made}
    return Decoding(parts, unfinished, normalized, decay, strength, True)


def decodes(layer: RecurrentMixer, x: Tensor, cu_seqlens: Tensor | None, state: MemoryState | None) -> bool:
    """Whether a call of `layer` on `x` `[B, T, D]` takes this path."""
    return (
        layer.decoding is not None
        and state is not None
        and x.shape[1] == 1
        and cu_seqlens is None
        and not torch.is_grad_enabled()
        and kernels_run(x, layer.impl)
        # The kernels write into them as they lie. After a call with gradients they may be views.
        and all(tensor.is_contiguous() for tensor in (state.memory, state.conv) if tensor is not None)
    )


def decode_token(
    layer: RecurrentMixer, tokens: Tensor, sequences: Sequences, valid: Tensor | None, state: MemoryState
) -> tuple[Tensor, Tensor | None]:
    """The layer's output `[B, D]` of one token of each sequence `[B, D]`, and the router's auxiliary loss.

    `valid` `[B]` is None where there is no pad. The state is updated in place: the picked memories' alone, and of a pad none.
    """
    from linear_moe.kernels.decode import decode_step
    from linear_moe.kernels.decode_projections import project_token
    from linear_moe.kernels.decode_tokens import Conv, Part, make_tokens

    plan, rule = layer.decoding, layer.rule
    assert plan is not None and rule.form is not None
    conv = None
    if state.conv is not None:
        assert layer.conv_weight is not None
        conv = Conv(state.conv, layer.conv_weight, layer.conv_bias)
    if layer.conv_scope == "sequence":
        assert conv is not None
        tokens, conv = _convolve_input(tokens, conv, valid), None
    assignment, loss = layer._assign(tokens, sequences, True)
    memory, weights = assignment.memory, assignment.weights
    gate_proj = plain_linear(layer.gate_proj) if layer.kernel_combines else None
    projected = project_token(
        tokens,
        None if layer.memory_weight is None else memory,
        layer.memory_weight,
        layer.token_weight,
        None if gate_proj is None else gate_proj.weight,
        dtype=autocast_dtype(tokens),
    )
    made = make_tokens(
        projected.memory,
        projected.token,
        [Part(*columns) for columns in plan.parts.values()],
        num_states=layer.num_states,
        memory=memory,
        valid=valid,
        conv=conv,
        gates=_gates(layer, plan),
    )
    raw = dict(zip(plan.parts, made.parts, strict=True))
    raw |= {name: _finish(layer, name, raw[name], memory) for name in plan.unfinished}
    raw = {name: value[None] for name, value in raw.items()}
    parameters = layer.gate_parameters.of_slots(lambda: memory.reshape(1, -1))
    positions = None
    if not plan.normalized:
        positions = state.tokens_seen[:, None].expand(-1, memory.shape[1]).reshape(1, -1)
    if plan.gates:
        log_decay, beta = (None if gate is None else gate[None] for gate in (made.log_decay, made.beta))
        rule_tokens = made_tokens(rule, raw, log_decay, beta, positions)
    elif positions is None:
        rule_tokens = rule.normalized_tokens(raw, parameters)
    else:
        rule_tokens = rule.tokens(raw, parameters, positions)
    decay, beta = rule_tokens.log_decay, rule_tokens.beta
    reads = decode_step(
        rule_tokens.q[0],
        rule_tokens.k[0],
        rule_tokens.v[0],
        None if decay is None else (decay if decay.dim() == 1 else decay[0]).float(),
        None if beta is None else beta[0],
        state.memory.flatten(0, 1),
        made.rows,
        form=rule.form,
        scale=rule.scale,
    )
    reads = rule.output(reads[None], rule_tokens, parameters)[0]
    output = _combine(layer, tokens, reads, weights, valid, projected.gate)
    state.tokens_seen.add_(sequences.lengths)
    return output, loss


def _convolve_input(tokens: Tensor, conv: Conv, valid: Tensor | None) -> Tensor:
    """X + SiLU(conv(x)); rounded where it is for many tokens, since it is what the router sees."""
    from linear_moe.kernels.decode_tokens import Part, make_tokens

    part = Part(by_token=True, column=0, width=tokens.shape[1], channel=0)
    (mixed,) = make_tokens(None, tokens, [part], num_states=1, valid=valid, conv=conv).parts
    mixed = tokens + F.silu(mixed)
    return mixed if valid is None else torch.where(valid[:, None], mixed, 0)


def _gates(layer: RecurrentMixer, plan: Decoding) -> Gates | None:
    from linear_moe.kernels.decode_tokens import Gate, Gates

    if not plan.gates:
        return None
    decay, strength = layer.rule.gate_forms()
    gates = Gates(layer.rule.dims.num_value_heads)
    if decay is not None and plan.decay is not None:
        rate, shift = (layer.gate_parameters.get_parameter(name) for name in (decay.rate, decay.shift))
        gates = gates._replace(decay=Gate(plan.decay.by_token, plan.decay.column), rate=rate, shift=shift)
    if strength is not None and plan.strength is not None:
        gate = Gate(plan.strength.by_token, plan.strength.column)
        gates = gates._replace(strength=gate, largest=strength.largest)
    return gates


def _finish(layer: RecurrentMixer, name: str, value: Tensor, memory: Tensor) -> Tensor:
    """A projection's second matrix, its bias and its activation: `[R, width]`."""
    from linear_moe.kernels.decode_projections import project_slots

    own = name in layer.memory_projections
    bias = layer.projection_bias.get(name)
    if own and name in layer.second_stage:
        value = project_slots(value, memory, layer.second_stage[name], bias)
    else:
        if name in layer.second_stage:
            value = F.linear(value, layer.second_stage[name][0])
        if bias is not None:
            value = value + (bias[memory.flatten()] if own else bias[0]).to(value.dtype)
    return activate(value, layer.activations[name])


def _combine(
    layer: RecurrentMixer, tokens: Tensor, reads: Tensor, weights: Tensor | None, valid: Tensor | None, gate: Tensor | None
) -> Tensor:  # fmt: skip
    """The weighted sum of a token's reads `[R, H, V]`, normed and gated, through `out_proj`: `[S, D]`; 0 of a pad."""
    from linear_moe.kernels.decode_projections import project_token
    from linear_moe.kernels.mixing import combine_reads

    num_tokens = tokens.shape[0]
    if not layer.kernel_combines:
        output = layer._combine(tokens, upcast(reads.unflatten(0, (num_tokens, -1))), weights)
        return output if valid is None else torch.where(valid[:, None], output, 0)
    if gate is None:
        assert layer.gate_proj is not None
        gate = layer.gate_proj(tokens)
    place = _slots_in_order(reads.shape[0], reads.device)
    mixed = combine_reads(reads, place, weights, gate, layer.norm.weight, eps=layer.norm.eps, valid=valid)
    out_proj = plain_linear(layer.out_proj) if num_tokens <= FEW_TOKENS else None
    made = layer.out_proj(mixed) if out_proj is None else project_token(mixed, None, None, out_proj.weight).token
    assert made is not None
    return made


@static
def _slots_in_order(num_slots: int, device: torch.device) -> Tensor:
    return torch.arange(num_slots, device=device)
