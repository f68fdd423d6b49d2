"""The mixture of experts: equal to its definition token by token, whatever the routing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.layers import mixture_of_experts
from linear_moe.layers.auxiliary import collect_auxiliary_losses, set_auxiliary_scale
from linear_moe.layers.mixture_of_experts import MixtureOfExperts
from linear_moe.layers.projections import grouped_linear
from linear_moe.testing.budget import assert_within_budget

SHAPES: list[dict[str, Any]] = [
    {"num_experts": 4, "top_k": 2},
    {"num_experts": 5, "top_k": 1, "num_shared_experts": 2},
    {"num_experts": 3, "top_k": 3, "router_score": "sigmoid", "renormalize": False},
    {"num_experts": 1, "top_k": 1},
]


def make(dtype: torch.dtype = torch.float64, **options: Any) -> MixtureOfExperts:
    layer = MixtureOfExperts(8, width=12, dtype=dtype, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def definition(layer: MixtureOfExperts, x_SD: Tensor) -> Tensor:
    """Each token through its experts, one at a time, in the token's own words."""
    rows = []
    for x_D in x_SD:
        logits = layer.router.weight @ x_D
        scores = torch.softmax(logits, 0) if layer.router.score == "softmax" else torch.sigmoid(logits)
        # Ties to the lowest index.
        ranked = scores.tolist()
        picked = sorted(range(layer.num_experts), key=lambda e: (-ranked[e], e))[: layer.top_k]
        renormalize = layer.router.renormalize and (layer.top_k > 1 or layer.num_experts == 1)
        total = scores[picked].sum() if renormalize else 1
        row = torch.zeros_like(x_D)
        for expert in picked:
            gate, up = (layer.in_weight[expert] @ x_D).chunk(2)
            row = row + scores[expert] / total * (layer.out_weight[expert] @ (F.silu(gate) * up))
        if layer.shared is not None:
            row = row + layer.shared(x_D)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_its_definition_with_all_gradients(shape: dict[str, Any]) -> None:
    layer = make(balance_weight=0.0, **shape)
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    probe = torch.randn(2, 7, 8, dtype=torch.float64)
    expected = definition(layer, x.flatten(0, 1)).view_as(x)
    output = layer(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    expected_gradients = torch.autograd.grad((expected * probe).sum(), wanted, allow_unused=True)
    gradients = torch.autograd.grad((output * probe).sum(), wanted)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        reference = torch.zeros_like(gradient) if reference is None else reference
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_float32_runs_the_grouped_matmul_with_the_same_result(shape: dict[str, Any]) -> None:
    wide = make(**shape)
    layer = make(torch.float32, **shape)
    layer.load_state_dict({name: tensor.float() for name, tensor in wide.state_dict().items()})
    x = torch.randn(2, 7, 8)
    torch.testing.assert_close(layer(x).double(), wide(x.double()), rtol=1e-4, atol=1e-4)
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_all_tokens_to_one_expert_leaves_the_others_zero_gradients() -> None:
    layer = make(torch.float32, num_experts=4, top_k=1, balance_weight=0.0)
    with torch.no_grad():
        layer.router.weight.zero_()  # ties: all tokens to expert 0
    layer(torch.randn(2, 5, 8)).sum().backward()
    assert layer.routing is not None
    assert layer.routing.load.tolist() == [1, 0, 0, 0]
    assert bool((layer.in_weight.grad[1:] == 0).all())
    assert bool((layer.in_weight.grad[0] != 0).any())


def test_pads_are_neither_routed_nor_counted() -> None:
    layer = make(num_experts=4, top_k=2, num_shared_experts=1)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    alone = layer(x[:1, 2:5])
    routing = layer.routing
    padded = layer(x.masked_fill(~mask[..., None], torch.nan), padding_mask=mask)
    torch.testing.assert_close(padded[0, 2:5], alone[0], rtol=0, atol=1e-12)
    assert bool((padded[~mask] == 0).all())
    assert routing is not None
    assert layer.routing is not None
    torch.testing.assert_close(layer.routing.load, routing.load)
    torch.testing.assert_close(layer.routing.balance_loss, routing.balance_loss)
    padded.sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in layer.parameters())


def test_pads_cost_no_expert_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(num_experts=4, top_k=2)
    borders: list[Tensor] = []

    def watched(x: Tensor, weight: Tensor, cu_groups: Tensor, *, covered: bool) -> Tensor:
        assert not covered
        borders.append(cu_groups)
        return grouped_linear(x, weight, cu_groups, covered=covered)

    monkeypatch.setattr(mixture_of_experts, "grouped_linear", watched)
    mask = torch.tensor([[False, True, True], [False, False, True]])
    layer(torch.randn(2, 3, 8, dtype=torch.float64), padding_mask=mask)
    assert [int(cu_groups[-1]) for cu_groups in borders] == [3 * layer.top_k] * 2


def test_the_balance_loss_is_attached_scaled_or_collected() -> None:
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    attached = make(num_experts=4, top_k=2, balance_weight=0.3, z_loss_weight=0.1)
    collected = make(num_experts=4, top_k=2, balance_weight=0.3, z_loss_weight=0.1, auxiliary="collect")
    collected.load_state_dict(attached.state_dict())
    set_auxiliary_scale(attached, 0.5)
    (attached(x).sum() * 0.5).backward()
    loss = collected(x).sum() + collect_auxiliary_losses(collected)
    (loss * 0.5).backward()
    torch.testing.assert_close(attached.router.weight.grad, collected.router.weight.grad, rtol=0, atol=1e-12)
    routing = attached.routing
    assert routing is not None
    expected = 4 * (routing.load * torch.softmax(x.flatten(0, 1) @ attached.router.weight.T, -1).mean(0)).sum()
    torch.testing.assert_close(routing.balance_loss, expected.detach(), rtol=0, atol=1e-7)


def test_the_bias_moves_load_towards_the_unused() -> None:
    layer = make(num_experts=4, top_k=1, balance_weight=0.0, balance_bias_rate=0.5)
    with torch.no_grad():
        layer.router.weight.zero_()
    x = torch.randn(1, 8, 8, dtype=torch.float64)
    layer(x)
    layer.update_balance_bias()
    layer(x)
    assert layer.routing is not None
    assert layer.routing.load.tolist() == [0, 1, 0, 0]
    make(num_experts=2, top_k=1).update_balance_bias()


def test_counts_and_precision() -> None:
    layer = MixtureOfExperts(8, width=16, num_experts=4, top_k=1, num_shared_experts=1)
    assert layer.inactive_parameters() == 3 * 3 * 8 * 16
    assert "experts=4 + 1 shared, top_k=1, width=16" in repr(layer)
    x = torch.randn(2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.float32
    assert layer(x[:, :0]).shape == (2, 0, 8)
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    half.sum().backward()


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measured(dtype: torch.dtype, impl: str, mask: Tensor | None, **options: Any) -> dict[str, Tensor]:
    """Output, statistics and all gradients of one loss, of the same numbers in any dtype."""
    torch.manual_seed(0)
    layer = make(torch.float32, impl=impl, **options).to(DEVICE, dtype)
    x, seed = (torch.randn(2, 7, 8).to(DEVICE, dtype) for _ in range(2))
    x.requires_grad_()
    output = layer(x, padding_mask=mask)
    gradients = torch.autograd.grad(output, [x, *layer.parameters()], seed)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    assert layer.routing is not None
    made = {"output": output.detach(), "load": layer.routing.load, "balance": layer.routing.balance_loss}
    return made | {f"d_{name}": gradient for name, gradient in zip(names, gradients, strict=True)}


KERNEL_SHAPES = [SHAPES[0] | {"num_shared_experts": 1, "z_loss_weight": 0.1}, *SHAPES[1:]]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_kernels_are_within_the_budget(shape: dict[str, Any], padded: bool) -> None:
    pytest.importorskip("triton", reason="triton is for Linux")
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 1], [1, 1, 0, 0, 0, 0, 0]]).bool().to(DEVICE) if padded else None
    candidate = measured(torch.float32, "triton", mask, **shape)
    reference = measured(torch.float32, "chunked", mask, **shape)
    exact = measured(torch.float64, "chunked", mask, **shape)
    # Sums over tokens and channels of either sign: their rounding is that of the largest of the kind.
    largest = max(float(value.abs().max()) for value in exact.values())
    terms = {name: torch.full((1,), largest, dtype=torch.float64) for name in exact}
    assert_within_budget(candidate, reference, exact, torch.float32, terms)
    again = measured(torch.float32, "triton", mask, **shape)
    assert all(torch.equal(again[name], value) for name, value in candidate.items())
    if mask is not None:
        assert not candidate["output"][~mask].any() and not candidate["d_x"][~mask].any()


def test_the_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that left them would pass the comparison above."""
    pytest.importorskip("triton", reason="triton is for Linux")
    from linear_moe.kernels import block_parts, mixing, router_operator

    called: list[str] = []
    for module, name in (
        (mixing, "plan_slots"), (mixing, "sum_slots"), (mixing, "weighted_sum"), (block_parts, "gated_unit"),
        (router_operator, "route"),
    ):  # fmt: skip
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=original, **k: (called.append(n), f(*a, **k))[1])
    measured(torch.float32, "triton", None, num_experts=3, top_k=2, num_shared_experts=1)
    expected = ["route", "plan_slots", "gated_unit", "gated_unit", "weighted_sum", "sum_slots"]
    assert called == expected
    measured(torch.float32, "chunked", None, num_experts=3, top_k=2, num_shared_experts=1)
    assert called == expected


# torch traces its autograd functions so.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("impl", ["chunked", "triton"])
def test_the_layer_is_one_graph_and_the_same(impl: str) -> None:
    if impl == "triton":
        pytest.importorskip("triton", reason="triton is for Linux")
    layer = make(torch.float32, num_experts=3, num_shared_experts=1, impl=impl).to(DEVICE)
    x = torch.randn(2, 5, 8, device=DEVICE, requires_grad=True)
    learned = [x, *layer.parameters()]
    try:
        outputs = layer(x), torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    seed = torch.randn_like(x)
    for one, other in zip(*(torch.autograd.grad(y, learned, seed) for y in outputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts must be an integer of at least 1, got 0"),
        ({"num_experts": 2, "top_k": 3}, r"top_k must be an integer in \[1, num_experts = 2\], got 3"),
        ({"num_shared_experts": -1}, "num_shared_experts must be at least 0, got -1"),
        ({"ratio": 2.0, "width": 3}, "ratio and width were both given"),
        ({"balance_weight": math.nan}, "balance_weight must be a finite number of at least 0, got nan"),
        ({"router_score": "tanh"}, "router_score must be one of softmax, sigmoid"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureOfExperts(8, **options)


def test_bad_input_is_named() -> None:
    layer = MixtureOfExperts(8, width=4)
    with pytest.raises(ValueError, match="hidden_size = 8"):
        layer(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="the layer's dtype"):
        layer(torch.randn(2, 3, 8).double())
    for mask in (torch.ones(2, 3), torch.ones(2, 4, dtype=torch.bool), [[True] * 3] * 2):
        with pytest.raises(
            ValueError, match=r"padding_mask must be bool of shape \[2, 3\] \(true on real tokens\), got"
        ):
            layer(torch.randn(2, 3, 8), padding_mask=mask)
