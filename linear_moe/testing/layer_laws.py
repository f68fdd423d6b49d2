"""What holds of `MoMLayer` and `MemoryLayer` with any rule: each law is tried on one small case."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.layers.mom import MoMLayer
from linear_moe.testing.laws import Case, Law, require, require_close, require_same_bits, require_zero
from linear_moe.testing.layer_cases import (
    Layer,
    choices,
    dense_input,
    gradients,
    mixture,
    one_memory,
    padded_input,
    require_definition,
    require_gradients,
)
from linear_moe.testing.layer_precision_laws import PRECISION_LAWS
from linear_moe.testing.layer_sequence_laws import SEQUENCE_LAWS

CAUSAL = 1e-12
"""How far outputs may move that nothing may reach, in float64: the same sums beside other rows."""


@torch.no_grad()
def _definition(case: Case) -> None:
    layer: Layer
    for layer in (mixture(case), one_memory(case)):
        x, mask = padded_input(case)
        require_definition(layer, x, padding_mask=mask)
        state = layer.new_state(len(case.lengths))
        layer(x, padding_mask=mask, state=state)
        require_definition(layer, dense_input(case, stream=1)[:, :5], state=state)


def _gradients(case: Case) -> None:
    x, mask = padded_input(case)
    require_gradients(mixture(case), x, padding_mask=mask)
    require_gradients(one_memory(case), x, padding_mask=mask)


def _training(case: Case) -> None:
    layer, x = mixture(case), dense_input(case)
    trained = layer.train()(x.requires_grad_())
    with torch.no_grad():
        require_close("output in eval mode", layer.eval()(x), trained, CAUSAL)


def _causal(case: Case) -> None:
    layer, x = mixture(case, balance_weight=0.0, z_loss_weight=0.0).train(), dense_input(case).requires_grad_()
    length = x.shape[1]
    changed = case.randn(*x.shape, stream=1)
    for cut in sorted({length // 3, length // 2, length - 1} - {0, -1}):
        earlier = layer(x)[:, :cut]
        (gradient,) = torch.autograd.grad((earlier * case.randn(*earlier.shape, stream=2)).sum(), x)
        require_zero(f"gradient from outputs before token {cut} to the later tokens", gradient[:, cut:])
        moved = layer(torch.cat((x[:, :cut], changed[:, cut:]), 1))[:, :cut]
        require_close(f"outputs before token {cut}, with other tokens after it,", moved, earlier, CAUSAL)


def _unpicked(case: Case) -> None:
    layer = mixture(case)
    for carries_gradients in (False, True):
        with torch.set_grad_enabled(carries_gradients):
            state = layer.new_state(len(case.lengths))
            layer(dense_input(case), state=state)
            before = state.clone()
            x, mask = padded_input(case, stream=1)
            mask &= mask.cumsum(1) <= 2
            layer(x, padding_mask=mask, state=state)
        assert layer.routing is not None
        picked = layer.routing.indices.unflatten(0, mask.shape)
        for b in range(len(case.lengths)):
            used = set(picked[b][mask[b]].flatten().tolist())
            idle = [m for m in range(case.num_memories) if m not in used]
            if not mask[b].any() and case.shared_memory:
                idle.append(case.num_memories)
            require_same_bits(f"memories {idle} of sequence {b}", state.memory[b, idle], before.memory[b, idle])
            if state.conv is not None and before.conv is not None and layer.conv_scope == "memory":
                require_same_bits(f"conv of memories {idle} of sequence {b}", state.conv[b, idle], before.conv[b, idle])


@torch.no_grad()
def _relabelling(case: Case) -> None:
    layer, relabelled = mixture(case), mixture(case)
    order = torch.tensor(choices(case).sample(range(case.num_memories), case.num_memories))
    with_shared = torch.cat((order, torch.arange(case.num_memories, layer.num_states)))
    for name, value in relabelled.state_dict().items():
        if name.startswith("router"):
            value.copy_(value[order])
        elif name in _stacked(layer):
            value.copy_(value[with_shared])
    x = dense_input(case)
    states = [each.new_state(len(case.lengths)) for each in (layer, relabelled)]
    require_close("output with the memories relabelled", relabelled(x, state=states[1]), layer(x, state=states[0]))
    require_close("memories, relabelled,", states[1].memory, states[0].memory[:, with_shared])
    require_close("balance loss", _routed(relabelled, "balance_loss"), _routed(layer, "balance_loss"))


def _stacked(layer: MoMLayer) -> set[str]:
    """Names of the parameters whose rows are memories."""
    own = {name for name, spec in layer.gate_parameters.declared.items() if spec.per_memory}
    return (
        {"memory_weight", "initial_memory"}
        | {f"gate_parameters.{name}" for name in own}
        | {f"{group}.{name}" for group in ("second_stage", "projection_bias") for name in layer.memory_projections}
    )


def _routed(layer: MoMLayer, name: str) -> Tensor:
    assert layer.routing is not None
    value: Tensor = getattr(layer.routing, name)
    return value


def _single(case: Case) -> None:
    options: dict[str, Any] = {"router_score": "softmax", "memory_projections": "memory", "query_projection": "shared"}
    options |= {"learned_initial_memory": False}
    weights = {"balance_weight": 0.0, "z_loss_weight": 0.0}
    mixed = mixture(case, num_memories=1, top_k=1, shared_memory=False, **options, **weights)
    plain = one_memory(case)
    plain.load_state_dict({name: p for name, p in mixed.state_dict().items() if not name.startswith("router")})
    x = dense_input(case).requires_grad_()
    outputs = mixed(x), plain(x)
    require_same_bits("output", *outputs)
    found = gradients(mixed, x, outputs[0].square().sum())
    for name, gradient in gradients(plain, x, outputs[1].square().sum()).items():
        other = found[name]
        if gradient is not None and other is not None:
            require_close(f"gradient of {name}", other, gradient)


def _empty(case: Case) -> None:
    layer = mixture(case)
    batch = len(case.lengths)
    with torch.no_grad():
        state = layer.new_state(batch)
        layer(dense_input(case), state=state)
        before = state.clone()
        nothing = layer(case.randn(batch, 0, case.hidden_size), state=state)
        require(nothing.shape == (batch, 0, case.hidden_size), f"no tokens give shape {list(nothing.shape)}")
        for name, tensor in state.tensors().items():
            require_same_bits(f"state.{name} after no tokens", tensor, before.tensors()[name])
    require_definition(layer, case.randn(batch, 1, case.hidden_size))
    x = case.randn(batch, 2, case.hidden_size)
    require_gradients(layer, x, padding_mask=torch.zeros(batch, 2, dtype=torch.bool))


def _ties(case: Case) -> None:
    layer = mixture(case, balance_bias_rate=0.0)
    with torch.no_grad():
        layer.router.weight.zero_()
    x = dense_input(case)
    found = require_gradients(layer, x)
    expected = torch.arange(case.top_k).expand(x.shape[0] * x.shape[1], -1)
    require_close("picks where all scores are equal", _routed(layer, "indices"), expected, 0)
    for name in _stacked(layer) & found.keys():
        rows = found[name]
        if rows.shape[0] == layer.num_states:
            require_zero(f"gradient of {name} for memories without a token", rows[case.top_k : case.num_memories])


def _one_takes_all(case: Case) -> None:
    """The last memory is everybody's first pick; where softmax gives the second a weight of 0, it is updated all the same."""
    layer = mixture(case, balance_bias_rate=0.0, z_loss_weight=0.0)
    x = F.pad(dense_input(case)[..., 1:], (1, 0), value=1.0)
    with torch.no_grad():
        layer.router.weight[-1, 0] += 1500
    require_gradients(layer, x)
    # The state tells what no output does: a memory that is read with a weight of 0.
    require_definition(layer, x)
    first = _routed(layer, "indices")[:, 0]
    require_close(
        "first picks, one score being far above all others,", first, torch.full_like(first, case.num_memories - 1), 0
    )


def _repeatable(case: Case) -> None:
    layer, x = mixture(case), dense_input(case).requires_grad_()
    outputs = [layer(x) for _ in range(2)]
    require_same_bits("output of a second call", outputs[1], outputs[0])
    first, second = (gradients(layer, x, output.square().sum()) for output in outputs)
    for name, gradient in first.items():
        other = second[name]
        if gradient is not None and other is not None:
            require_same_bits(f"gradient of {name} in a second call", other, gradient)


def _strided(case: Case) -> None:
    layer = mixture(case)
    x, mask = padded_input(case)
    expected = layer(x, padding_mask=mask)
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    spread = torch.stack((x, x), -1)[..., 0]
    strided_mask = mask.t().contiguous().t()
    require_close("output of a transposed input", layer(swapped, padding_mask=strided_mask), expected)
    require_close("output of an input with gaps", layer(spread, padding_mask=mask), expected)
    require_close("output of an expanded input", layer(x[:1].expand_as(x)), layer(x[:1].repeat(x.shape[0], 1, 1)))


LAYER_LAWS: list[Law] = [
    Law(
        "layer-definition",
        "a layer's output, state and statistics are those of its equations, token by token",
        _definition,
    ),
    Law(
        "layer-gradients",
        "all gradients of a layer are those of its equations; unused memories get 0, not None",
        _gradients,
    ),
    Law("layer-training", "a layer computes in training what it computes in evaluation", _training),
    Law("layer-causal", "in training too, no output depends on a later token", _causal),
    Law("layer-unpicked", "a memory that no token picked keeps its bits, those of its convolution too", _unpicked),
    Law("layer-relabelling", "which number a memory has changes nothing", _relabelling),
    Law("layer-single", "a mixture of one memory, without a shared one, is the plain layer, bit for bit", _single),
    Law("layer-empty", "no tokens, one token and nothing but pads are inputs like others", _empty),
    Law("layer-ties", "equal scores go to the lowest indices, and empty memories get gradients of 0", _ties),
    Law(
        "layer-one-takes-all",
        "all tokens may go to one memory; one picked with a weight of 0 is updated",
        _one_takes_all,
    ),
    Law("layer-repeatable", "the same input gives the same bits, forward and backward", _repeatable),
    Law("layer-strides", "how the input lies in memory changes nothing", _strided),
    *SEQUENCE_LAWS,
    *PRECISION_LAWS,
]
"""Tried by `check_rule`, too."""
