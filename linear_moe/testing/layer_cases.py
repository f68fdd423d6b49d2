"""The layers and inputs of a `Case`, in float64, and how a layer is held against its definition."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from linear_moe.layers.memory import MemoryLayer
from linear_moe.layers.mom import MoMLayer
from linear_moe.layers.state import MemoryState
from linear_moe.testing.laws import Case, require, require_all_close, require_close, seeded
from linear_moe.testing.mom_reference import mom_reference

Layer = MoMLayer | MemoryLayer


def mixture(case: Case, **changes: Any) -> MoMLayer:
    """The mixture of memories of a case; `changes` overrule its options. Losses with weights that show."""
    own: dict[str, Any] = {
        "num_memories": case.num_memories,
        "top_k": case.top_k,
        "shared_memory": case.shared_memory,
        "balance_weight": 0.3,
        "z_loss_weight": 0.1,
    }
    layer = MoMLayer(case.hidden_size, case.rule, **_sizes(case) | own | dict(case.layer_options) | changes)
    _stir(layer, case)
    return layer


def one_memory(case: Case) -> MemoryLayer:
    """The layer of one memory of a case."""
    own = {name: value for name, value in case.layer_options.items() if name in ("conv_scope", "conv_width", "impl")}
    layer = MemoryLayer(case.hidden_size, case.rule, **_sizes(case) | own)
    _stir(layer, case)
    return layer


def _sizes(case: Case) -> dict[str, Any]:
    return {
        "num_heads": case.num_heads,
        "num_value_heads": case.num_value_heads,
        "head_dim": case.head_dim,
        "head_value_dim": case.head_value_dim,
        "rule_options": dict(case.options),
        "dtype": torch.float64,
    }


@torch.no_grad()
def _stir(layer: Layer, case: Case) -> None:
    """Every parameter its own number, of a size that matters. A rule's own parameters stay as the rule starts them."""
    with seeded(case.seed):
        layer.reset_parameters()
    for stream, (name, parameter) in enumerate(layer.named_parameters()):
        if name.startswith(("memory_weight", "token_weight", "second_stage", "router")):
            # Starting values are so small that one token would hardly be told from another.
            parameter.mul_(4)
        elif not name.startswith("gate_parameters"):
            parameter.add_(case.randn(*parameter.shape, stream=100 + stream), alpha=0.2)
    if isinstance(layer, MoMLayer) and layer.router.bias is not None:
        layer.router.bias.bias.copy_(0.1 * case.randn(layer.num_memories, stream=99))


def dense_input(case: Case, stream: int = 0) -> Tensor:
    """`[B, T, D]` without pads, T the longest of the case's lengths."""
    return case.randn(len(case.lengths), max(case.lengths), case.hidden_size, stream=stream)


def padded_input(case: Case, stream: int = 0) -> tuple[Tensor, Tensor]:
    """`[B, T, D]` and its mask `[B, T]`: sequence b has `lengths[b]` real tokens, with pads before, between and after."""
    chosen = choices(case, stream)
    total = max(case.lengths) + chosen.randint(0, 3)
    mask = torch.zeros(len(case.lengths), total, dtype=torch.bool)
    for row, length in zip(mask, case.lengths, strict=True):
        row[chosen.sample(range(total), length)] = True
    return case.randn(len(case.lengths), total, case.hidden_size, stream=stream), mask


def packed_input(case: Case, stream: int = 0) -> tuple[Tensor, Tensor]:
    """`[1, sum of lengths, D]` and its `cu_seqlens`."""
    return case.randn(1, sum(case.lengths), case.hidden_size, stream=stream), case.cu_seqlens


def choices(case: Case, stream: int = 0) -> random.Random:
    """For what a law draws besides tensors."""
    return random.Random(1000 * case.seed + stream)


def require_close_states(got: MemoryState, expected: MemoryState, what: str = "state") -> None:
    """Every tensor near, the tokens seen equal."""
    named = {f"{what}.{name}": tensor for name, tensor in got.tensors().items()}
    require_all_close(named, {f"{what}.{name}": tensor for name, tensor in expected.tensors().items()})


def gradients(layer: Layer, x: Tensor, loss: Tensor) -> dict[str, Tensor | None]:
    """Of the input and of every parameter that has a number in it, by name. Without a token there are none."""
    if not x.numel():
        return {}
    named = {"x": x} | {name: p for name, p in layer.named_parameters() if p.numel()}
    if not loss.requires_grad:
        return dict.fromkeys(named)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def present(found: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Gradients that are there, as all should be: where nothing was used a gradient is 0, not None."""
    missing = [name for name, gradient in found.items() if gradient is None]
    require(not missing, f"the gradient of {', '.join(missing)} is None; where nothing was used it should be 0")
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def require_definition(layer: Layer, x: Tensor, state: MemoryState | None = None, **sequences: Any) -> None:
    """Output, state and statistics are those of `mom_reference`."""
    expected = mom_reference(layer, x, state=state, **sequences)
    after = layer.new_state(expected.tokens.numel()) if state is None else state.clone()
    seen = after.tokens_seen.clone()
    require_close("output", layer(x, state=after, **sequences), expected.output)
    require_close("state.memory", after.memory, expected.memory)
    if after.conv is not None:
        assert expected.conv is not None
        require_close("state.conv", after.conv, expected.conv)
    require_close("tokens seen", after.tokens_seen - seen, expected.tokens, 0)
    if isinstance(layer, MoMLayer):
        assert layer.routing is not None
        for name in ("load", "entropy", "balance_loss", "z_loss"):
            require_close(name, getattr(layer.routing, name), getattr(expected, name))


def require_gradients(layer: Layer, x: Tensor, **sequences: Any) -> dict[str, Tensor]:
    """Output and all gradients, those of the auxiliary losses too, are those of `mom_reference`. Returns the gradients."""
    x = x.detach().requires_grad_()
    expected = mom_reference(layer, x, **sequences)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel()), dtype=x.dtype)
    wanted = gradients(layer, x, (expected.output * cotangent).sum() + expected.loss)
    output = layer(x, **sequences)
    require_close("output", output, expected.output)
    got = present(gradients(layer, x, (output * cotangent).sum()))
    for name, gradient in got.items():
        other = wanted[name]
        require_close(f"gradient of {name}", gradient, torch.zeros_like(gradient) if other is None else other)
    return got
