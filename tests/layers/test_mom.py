"""`MoMLayer` as a module: its parameters, how they start, what it says of itself, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe import MemoryLayer, MoMLayer, rule_names
from linear_moe.rules import GatedDeltaNet

RULES = ("linear_attention", "retnet", "gla", "mamba2", "deltanet", "gated_deltanet")


def small(rule: str = "gated_deltanet", **options: Any) -> MoMLayer:
    return MoMLayer(8, rule, **{"num_heads": 2, "head_dim": 4} | options)


def xavier_bound(fan_in: int, fan_out: int) -> float:
    return float(2**-2.5 * (6 / (fan_in + fan_out)) ** 0.5)


def assert_uniform(matrix: Tensor, bound: float) -> None:
    assert matrix.abs().max().item() <= bound
    assert matrix.abs().max().item() > 0.9 * bound
    assert matrix.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_the_papers_layer_has_its_parameter_count() -> None:
    layer = MoMLayer(1024, device="meta")
    assert sum(parameter.numel() for parameter in layer.parameters()) == 13_689_096
    assert layer.inactive_parameters() == 4_210_688


def test_the_state_of_one_memory_of_the_papers_layer_has_262144_numbers() -> None:
    state = MoMLayer(1024, device="meta").new_state(1)
    assert state.memory[0, 0].numel() == 262_144


def test_the_rules_of_the_zoo_are_registered() -> None:
    assert set(RULES) <= set(rule_names())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scope", ["memory", "shared"])
def test_inactive_parameters_are_those_that_other_memories_own(rule: str, scope: str) -> None:
    """One memory more adds its own parameters and a row of the router; picked memories are not idle."""
    few, more = (small(rule, num_memories=m, memory_projections=scope, query_projection=scope) for m in (3, 4))
    own = sum(p.numel() for p in more.parameters()) - sum(p.numel() for p in few.parameters()) - 8
    assert [few.inactive_parameters(), more.inactive_parameters()] == [own, 2 * own]
    assert small(rule, num_memories=2, top_k=2).inactive_parameters() == 0


def test_every_matrix_of_every_memory_starts_with_the_xavier_bound_of_its_own_fan() -> None:
    layer = MoMLayer(64, num_heads=2, head_dim=32, head_value_dim=48)
    key, value, gate = 64, 96, 2
    parts = layer.memory_weight.detach().split([key, value, gate, gate], 1)
    for part in parts:
        for matrix in part:
            if matrix.shape[0] == gate:
                assert matrix.abs().max().item() <= xavier_bound(64, gate)
            else:
                assert_uniform(matrix, xavier_bound(64, matrix.shape[0]))
    assert parts[2].abs().max().item() > xavier_bound(64, value), (
        "a gate's fan is its own, not that of the fused matrix"
    )
    assert_uniform(layer.token_weight.detach(), xavier_bound(64, 64))
    assert_uniform(layer.gate_proj.weight.detach(), xavier_bound(64, value))
    assert_uniform(layer.out_proj.weight.detach(), xavier_bound(value, 64))
    assert layer.router.weight.abs().max().item() <= xavier_bound(64, 4)


def test_the_two_matrices_of_a_bottleneck_start_with_their_own_fans() -> None:
    layer = MoMLayer(64, "gla", num_heads=2, head_dim=32, rule_options={"gate_rank": 8})
    second = layer.second_stage["decay"]
    assert second.shape == (5, 64, 8)
    assert_uniform(second.detach(), xavier_bound(8, 64))
    assert not layer.projection_bias["decay"].any()


def test_gates_start_as_published() -> None:
    layer = MoMLayer(64, num_heads=64, head_dim=2)
    rate = layer.gate_parameters.get_parameter("A_log").exp()
    step = torch.nn.functional.softplus(layer.gate_parameters.get_parameter("dt_bias"))
    assert 0 <= rate.min().item() < 2 and 14 < rate.max().item() <= 16
    assert 0.99e-3 <= step.min().item() < 2e-3 and 0.05 < step.max().item() <= 0.101


def test_the_conv_starts_as_a_depthwise_convolution() -> None:
    layer = small(conv_width=3)
    assert layer.conv_weight is not None
    assert_uniform(layer.conv_weight.detach(), 3**-0.5)


def test_the_learned_initial_memory_starts_at_0() -> None:
    layer = small(learned_initial_memory=True)
    assert layer.initial_memory is not None
    assert layer.initial_memory.shape == (5, 2, 4, 4) and not layer.initial_memory.any()


def test_reset_parameters_draws_every_parameter_again() -> None:
    layer = small("gla", num_memories=3)
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    layer.reset_parameters()
    assert not any(bool((parameter == 7).any()) for parameter in layer.parameters())


def test_a_layer_made_on_meta_is_materialised_and_drawn() -> None:
    layer = small(device="meta")
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer.to_empty(device="cpu").reset_parameters()
    for buffer in layer.buffers():
        assert buffer.item() == 1, "the scale of the auxiliary loss"
    assert layer(torch.randn(1, 3, 8)).isfinite().all()


@pytest.mark.parametrize("rule", RULES)
def test_it_tells_the_rule_memories_and_parameters(rule: str) -> None:
    layer = small(rule)
    count = sum(parameter.numel() for parameter in layer.parameters())
    for part in (f"rule={rule}", "memories=4 + shared", "top_k=2", f"parameters={count:,}", "heads=2", "K=4", "V=4"):
        assert part in layer.extra_repr()
    assert "memories=4, top_k" in small(rule, shared_memory=False).extra_repr()
    assert f"rule={rule}" in repr(MemoryLayer(8, rule, num_heads=2, head_dim=4))


def test_a_rules_class_serves_as_well_as_its_name() -> None:
    assert small(GatedDeltaNet).rule == small("gated_deltanet").rule  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "state_dict"])
def test_a_copy_computes_the_same(rule: str, copier: str) -> None:
    layer, x = small(rule), torch.randn(2, 5, 8)
    # A layer that has been trained with, not one fresh from its constructor: it may hold what the forward left behind.
    layer(x).sum().backward()
    if copier == "deepcopy":
        copied = copy.deepcopy(layer)
    elif copier == "pickle":
        copied = pickle.loads(pickle.dumps(layer))
    else:
        copied, saved = small(rule), io.BytesIO()
        torch.save(layer.state_dict(), saved)
        saved.seek(0)
        copied.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(copied(x), layer(x))


def test_the_state_dict_holds_parameters_and_the_selection_bias() -> None:
    layer = small(balance_bias_rate=0.1)
    assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()} | {"router.bias.bias"}


def test_a_forward_leaves_no_graph_behind() -> None:
    """What the layer keeps to be read must not keep a step's activations alive."""
    layer = small()
    layer(torch.randn(2, 5, 8))
    assert layer.routing is not None
    assert not any(tensor.requires_grad for tensor in vars(layer.routing).values())


@pytest.mark.parametrize("rule", RULES)
def test_casting_to_double_computes_in_double(rule: str) -> None:
    layer = small(rule).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    state = layer.new_state(2)
    y = layer(x, state=state)
    assert y.dtype == state.memory.dtype == torch.float64
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float64 for p in layer.parameters())


def test_value_heads_may_outnumber_key_heads() -> None:
    layer = small(num_value_heads=6, head_value_dim=3)
    assert layer.new_state(2).memory.shape == (2, 5, 6, 4, 3)
    assert layer(torch.randn(2, 5, 8)).shape == (2, 5, 8)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rule": "gated_deltanets"}, "unknown rule 'gated_deltanets'; did you mean 'gated_deltanet'"),
        ({"rule": "nonsense"}, "unknown rule 'nonsense'; registered: .*gla"),
        ({"top_k": 5}, r"top_k must be .*in \[1, num_memories = 4\], got 5"),
        ({"top_k": 0}, r"top_k must be .*in \[1, num_memories = 4\], got 0"),
        ({"num_memories": 0}, "num_memories must be .*at least 1, got 0"),
        ({"num_memories": -3}, "num_memories must be .*at least 1, got -3"),
        ({"num_memories": 2.5}, "num_memories must be .*, got 2.5"),
        ({"top_k": 1.5}, "top_k must be .*, got 1.5"),
        ({"conv_width": 2.5}, "conv_width must be .*, got 2.5"),
        ({"norm_eps": -1.0}, "norm_eps must be .*, got -1.0"),
        ({"output_gate": "tanh"}, "output_gate must be one of silu, sigmoid, none, got 'tanh'"),
        ({"norm_groups": 3}, "norm_groups must divide the 8 value channels, got 3"),
        ({"norm_groups": 0}, "norm_groups must divide the 8 value channels, got 0"),
        ({"output_gate": "none", "gate_before_norm": True}, "gate_before_norm=True needs an output gate"),
        ({"rule": torch.nn.Linear}, "rule must be .*, got .*Linear"),
        ({"num_heads": 0}, "num_heads must be an integer of at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be an integer of at least 1, got 0"),
        ({"head_dim": 4.0}, "head_dim must be an integer of at least 1, got 4.0"),
        ({"num_heads": 2, "num_value_heads": 3}, "num_value_heads must be a multiple of num_heads = 2, got 3"),
        ({"conv_width": 0}, "conv_width must be .*at least 1, got 0"),
        ({"conv_scope": "token"}, "conv_scope must be one of memory, sequence, got 'token'"),
        ({"memory_projections": "own"}, "memory_projections must be one of memory, shared, got 'own'"),
        ({"query_projection": "own"}, "query_projection must be one of memory, shared, got 'own'"),
        ({"router_score": "relu"}, "router_score must be one of softmax, sigmoid, got 'relu'"),
        ({"balance_weight": math.nan}, "balance_weight must be a finite number of at least 0, got nan"),
        ({"auxiliary": "none"}, "auxiliary must be one of attach, collect, got 'none'"),
        ({"impl": "cuda"}, "impl must be one of auto, triton, chunked, recurrent, got 'cuda'"),
        ({"layer_index": 2, "num_layers": 2}, r"layer_index must be in \[0, num_layers = 2\), got 2"),
        ({"rule_options": {"gate_rank": 4}}, "rule 'gated_deltanet' has no option 'gate_rank'; it has: allow_negative"),
        ({"rule": "gla", "rule_options": {"gate_rank": 0}}, "gate_rank must be at least 1, got 0"),
        ({"rule": "retnet", "head_dim": 5}, "head_dim must be even for retnet .*, got 5"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoMLayer(8, **{"num_heads": 2, "head_dim": 4} | options)


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.randn(5, 8), r"x must be \[B, T, D\], got shape \(5, 8\)"),
        (torch.randn(2, 5, 9), r"x must have hidden_size = 8 channels, got shape \[2, 5, 9\]"),
        (torch.randn(2, 5, 8, dtype=torch.float64), "x must have the layer's dtype, torch.float32, got torch.float64"),
        (torch.zeros(2, 5, 8, dtype=torch.int64), "x must have the layer's dtype, torch.float32, got torch.int64"),
    ],
)
def test_input_that_does_not_fit_is_refused(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small()(x)


def test_a_mask_and_borders_together_are_refused() -> None:
    with pytest.raises(ValueError, match="padding_mask and cu_seqlens were both given"):
        small()(torch.randn(1, 5, 8), padding_mask=torch.ones(1, 5, dtype=torch.bool), cu_seqlens=torch.tensor([0, 5]))


def test_an_impl_that_can_not_run_here_is_refused() -> None:
    with pytest.raises(ValueError, match=r"impl='triton' can't run here: .*; available: auto, chunked, recurrent"):
        # No kernel takes float64, wherever it runs.
        small(impl="triton", dtype=torch.float64)(torch.randn(1, 3, 8, dtype=torch.float64))


def test_a_batch_of_no_sequences_gives_none() -> None:
    assert small()(torch.randn(0, 5, 8)).shape == (0, 5, 8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("memory, query", [("shared", "shared"), ("memory", "memory"), ("shared", "memory")])
def test_every_parameter_has_a_number_and_a_gradient(rule: str, memory: str, query: str) -> None:
    """A parameter without either would stop distributed training, which waits for the gradient of each."""
    layer = small(rule, memory_projections=memory, query_projection=query, learned_initial_memory=True)
    layer(torch.randn(2, 3, 8)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.numel() and parameter.grad is not None, name


@pytest.mark.parametrize(
    "options", [{"gate_rank": "x"}, {"gate_rank": 2.0}, {"short_conv": "yes"}, {"gate_rank": True}]
)
def test_rule_options_of_another_type_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"option '{name}' of rule 'gla' must be a (int|bool), got"):
        MoMLayer(8, "gla", num_heads=2, head_dim=4, rule_options=options)


@pytest.mark.parametrize("options", [{"memory_projections": "shared"}, {"query_projection": "memory"}, {}])
def test_every_parameter_has_numbers_and_a_gradient(options: dict[str, Any]) -> None:
    layer = small(**options)
    layer(torch.randn(2, 5, 8)).sum().backward()
    assert all(parameter.numel() and parameter.grad is not None for parameter in layer.parameters())
