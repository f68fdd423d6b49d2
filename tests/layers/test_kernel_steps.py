"""Layers whose steps run on kernels of their own, against the same layers in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton is for Linux")

from linear_moe.forms import GateForms, SigmoidStrength, SoftplusDecay
from linear_moe.kernels import combine, decode_tokens, mixing, residual_norm, router, slot_conv
from linear_moe.layers import MemoryLayer, MoMLayer, kernel_steps, recurrent_mixer, routing, slot_projections
from linear_moe.rules.base import Projection
from linear_moe.testing.budget import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES: dict[str, Any] = {"num_heads": 2, "head_dim": 8}
MIXTURE = {"num_memories": 3, "top_k": 2}


def test_layers_and_kernels_know_the_same_limits() -> None:
    """Layers say theirs without Triton, which only Linux has."""
    assert kernel_steps.LARGEST_CONV_WIDTH == slot_conv.LARGEST_WIDTH == decode_tokens.LARGEST_WIDTH
    assert (
        kernel_steps.LARGEST_HEAD == slot_conv.LARGEST_HEAD == decode_tokens.LARGEST_HEAD == combine.LARGEST_VALUE_DIM
    )
    assert kernel_steps.LARGEST_NORM == residual_norm.LARGEST_WIDTH
    assert routing.LARGEST_KERNEL_CHOICES == router.LARGEST_CHOICES


def build(rule: str, dtype: torch.dtype, *, impl: str, memory: bool = False, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    cls, mixture = (MemoryLayer, {}) if memory else (MoMLayer, MIXTURE)
    layer = cls(16, rule, **SIZES | mixture | options, impl=impl).to(DEVICE)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer.to(dtype)


def measured(layer: nn.Module, x: Tensor, **given: Any) -> dict[str, Tensor]:
    """Output and all gradients of one loss."""
    x = x.detach().to(layer.out_proj.weight.dtype).requires_grad_()
    y = layer(x, **given)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    names = [name for name, _ in layer.named_parameters()]
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], seed.to(y.dtype))
    return {"y": y.detach(), "x": gradients[0]} | dict(zip(names, gradients[1:], strict=True))


def check(rule: str, x: Tensor, *, given: dict[str, Any] | None = None, **options: Any) -> None:
    """Kernels in float32 are within the budget of PyTorch's."""
    candidate = measured(build(rule, torch.float32, impl="triton", **options), x, **given or {})
    reference = measured(build(rule, torch.float32, impl="chunked", **options), x, **given or {})
    exact = measured(build(rule, torch.float64, impl="chunked", **options), x, **given or {})
    # A parameter's gradient is a sum over tokens of either sign: its rounding is that of the largest gradient of its kind.
    largest = max(float(value.abs().max()) for value in exact.values())
    terms = {name: torch.full((1,), largest, dtype=torch.float64) for name in exact}
    assert_within_budget(candidate, reference, exact, torch.float32, terms)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize("rule", ["gated_deltanet", "gla", "mamba2", "retnet", "linear_attention", "deltanet"])
def test_a_mixture_of_any_rule(rule: str) -> None:
    check(rule, tokens(2, 7))


@pytest.mark.parametrize("rule", ["gated_deltanet", "mamba2"])
def test_one_memory(rule: str) -> None:
    check(rule, tokens(2, 7), memory=True)


@pytest.mark.parametrize(
    "options",
    [
        {"conv_scope": "sequence"},
        {"memory_projections": "shared"},
        {"query_projection": "memory"},
        {"shared_memory": False},
        {"conv_width": 1},
        {"output_gate": "sigmoid"},
        {"norm_groups": 1},
        {"head_value_dim": 12, "num_value_heads": 4},
    ],
    ids=str,
)
def test_options_take_the_kernels_or_leave_them(options: dict[str, Any]) -> None:
    check("gated_deltanet", tokens(1, 6), **options)


def test_pads_and_documents() -> None:
    x = tokens(2, 8)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]], dtype=torch.bool, device=DEVICE)
    check("gated_deltanet", x, given={"padding_mask": mask})
    check("gated_deltanet", x[:1], given={"cu_seqlens": torch.tensor([0, 3, 3, 8], device=DEVICE)})


def test_rows_of_no_memory_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products by group leave the rows behind the last group as they were in memory."""
    by_index, by_group = mixing.routed_product, F.grouped_mm
    poisoned = []

    def poison(made: Tensor, end: int) -> Tensor:
        if made.dim() == 2:
            poisoned.append(made.shape[0] - end)
            made[end:] = torch.nan
        return made

    def routed_product(x: Tensor, source: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return poison(by_index(x, source, weight, ends), int(ends[-1]))

    monkeypatch.setattr(mixing, "routed_product", routed_product)
    monkeypatch.setattr(F, "grouped_mm", lambda a, b, *, offs: poison(by_group(a, b, offs=offs), int(offs[-1])))
    x = tokens(2, 8)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]], dtype=torch.bool, device=DEVICE)
    check("gated_deltanet", x, given={"padding_mask": mask})
    # On a GPU float32 takes neither.
    assert set(poisoned) == ({18} if DEVICE == "cpu" else set())


@torch.no_grad()
@pytest.mark.parametrize("rule", ["gated_deltanet", "mamba2"])
def test_splits_with_a_carried_state(rule: str) -> None:
    layer, x = build(rule, torch.float32, impl="triton"), tokens(2, 9)
    exact = build(rule, torch.float64, impl="chunked")
    state, wide = layer.new_state(2), exact.new_state(2)
    parts = [layer(x[:, begin:end], state=state) for begin, end in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), exact(x.double(), state=wide).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.memory, wide.memory.float(), rtol=1e-4, atol=1e-5)
    assert state.conv is not None and wide.conv is not None
    torch.testing.assert_close(state.conv, wide.conv.float(), rtol=1e-4, atol=1e-5)


def test_where_the_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 3)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernel_steps.kernels_run(x, "triton")
    # In the interpreter only by name.
    assert not kernel_steps.kernels_run(x, "auto")
    assert not kernel_steps.kernels_run(x, "chunked")
    assert not kernel_steps.kernels_run(x.double(), "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not kernel_steps.kernels_run(x, "triton")


def test_the_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that left them would pass every comparison above."""
    called: list[str] = []
    for module, name in ((recurrent_mixer, "plan_of"), (slot_projections, "SlotConv")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=original, **k: (called.append(n), f(*a, **k))[1])
    layer = build("gated_deltanet", torch.float32, impl="triton")
    monkeypatch.setattr(layer, "_combine", None)
    monkeypatch.setattr(layer.router, "_in_torch", None)
    layer(tokens(1, 3))
    assert called == ["plan_of", "SlotConv"]


class Adapted(nn.Module):
    """A linear map with a second one of low rank beside it, as adapters put in its place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.low = nn.Linear(base.in_features, base.out_features, bias=False).to(base.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.base(x), self.low(x))


@pytest.mark.parametrize("memory", [False, True])
def test_a_module_in_the_place_of_the_gates_is_called(memory: bool) -> None:
    """Its tokens' gradient is added to that of the other products."""

    def adapted(dtype: torch.dtype, impl: str) -> nn.Module:
        layer = build("gated_deltanet", dtype, impl=impl, memory=memory)
        torch.manual_seed(1)
        layer.gate_proj = Adapted(layer.gate_proj)
        return layer

    x = tokens(2, 7)
    candidate = measured(adapted(torch.float32, "triton"), x)
    reference, exact = (measured(adapted(dtype, "chunked"), x) for dtype in (torch.float32, torch.float64))
    assert "gate_proj.low.weight" in candidate
    largest = max(float(value.abs().max()) for value in exact.values())
    terms = {name: torch.full((1,), largest, dtype=torch.float64) for name in exact}
    assert_within_budget(candidate, reference, exact, torch.float32, terms)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_of_the_gates_projection_are_called(hook: str) -> None:
    layer, calls = build("gated_deltanet", torch.float32, impl="triton"), []
    getattr(layer.gate_proj, hook)(lambda *given: calls.append(len(given)))
    layer(tokens(1, 5).requires_grad_()).sum().backward()
    assert len(calls) == 1


def test_what_is_frozen_gets_no_gradient_and_changes_no_other() -> None:
    def gradients(frozen: str | None) -> dict[str, Tensor | None]:
        layer, x = build("gated_deltanet", torch.float32, impl="triton"), tokens(2, 7).requires_grad_(frozen != "x")
        if frozen not in (None, "x"):
            layer.get_parameter(frozen).requires_grad_(False)
        layer(x).square().sum().backward()
        return {"x": x.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}

    expected = gradients(None)
    for frozen in ("memory_weight", "token_weight", "gate_proj.weight", "conv_weight", "x"):
        for name, gradient in gradients(frozen).items():
            if name == frozen:
                assert gradient is None
            else:
                assert gradient is not None and torch.equal(gradient, expected[name]), (frozen, name)


def parts_of(*names: str) -> dict[str, kernel_steps.ConvPart]:
    return {name: kernel_steps.ConvPart(name, 4 * n, 4, "silu", None) for n, name in enumerate(names)}


def test_what_is_convolved_together() -> None:
    """All of a weight's channels, or some that lie side by side; gates where they are all that is left."""
    convolved, gate = Projection(4, conv=True), Projection(2)
    forms = GateForms(SoftplusDecay("a", "rate", "shift"), SigmoidStrength("b", 2.0))
    parts = parts_of("q", "k", "v")
    slots = {"k": convolved, "v": convolved, "a": gate, "b": gate}

    together = kernel_steps.made_together(parts, slots, {"q": convolved}, forms, 2)
    assert together == ([parts["k"], parts["v"]], parts["q"], (8, 10, 2, 2.0))
    assert kernel_steps.conv_runs(parts, together) == [[parts["q"], parts["k"], parts["v"]]]
    # A column that is no gate's.
    more = kernel_steps.made_together(parts, slots | {"c": gate}, {"q": convolved}, forms, 2)
    assert more == ([parts["k"], parts["v"]], parts["q"], None)
    # Something beside q is made once a token: the slots' parts are side by side in the weight.
    apart = kernel_steps.made_together(parts, slots, {"q": convolved, "c": gate}, forms, 2)
    assert apart == ([parts["k"], parts["v"]], None, (8, 10, 2, 2.0))
    assert kernel_steps.conv_runs(parts, apart) == [[parts["q"]], [parts["k"], parts["v"]]]
    # Here they are not.
    between = parts_of("k", "q", "v")
    torn = kernel_steps.made_together(between, slots, {"q": convolved, "c": gate}, forms, 2)
    assert torn == ([between["k"]], None, None)
    assert kernel_steps.conv_runs(between, torn) == [[between["k"]], [between["q"]], [between["v"]]]
    # What comes first is not convolved.
    assert kernel_steps.made_together(parts, {"a": gate, "k": convolved}, {}, forms, 2) is None
    assert kernel_steps.made_together(None, slots, {}, forms, 2) is None
