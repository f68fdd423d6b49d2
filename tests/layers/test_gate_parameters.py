from __future__ import annotations

import copy

import pytest
import torch

from linear_moe import MoMLayer
from linear_moe.layers.gate_parameters import GateParameters
from linear_moe.rules import Parameter

DECLARED = {
    "rate": Parameter((3,), torch.ones),
    "own": Parameter((3,), torch.randn, per_memory=True),
    "plain": Parameter((2,), torch.zeros, fp32=False, weight_decay=True),
}


def dtypes(module: GateParameters) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in module.named_parameters()}


NARROW = {"rate": torch.float32, "own": torch.float32, "plain": torch.bfloat16}


def test_bfloat16_leaves_the_gates_in_float32() -> None:
    gates = GateParameters(DECLARED, 4)
    before = gates.get_parameter("own").detach().clone()
    assert dtypes(gates.bfloat16()) == NARROW
    assert torch.equal(gates.get_parameter("own"), before)


def test_to_a_half_dtype_leaves_the_gates_in_float32() -> None:
    assert dtypes(GateParameters(DECLARED, 4).to(torch.bfloat16)) == NARROW
    assert dtypes(GateParameters(DECLARED, 4).half())["rate"] == torch.float32


def test_a_half_layer_is_built_with_float32_gates() -> None:
    assert dtypes(GateParameters(DECLARED, 4, dtype=torch.bfloat16)) == NARROW
    layer = MoMLayer(8, num_heads=1, head_dim=4, dtype=torch.bfloat16)
    assert {p.dtype for p in layer.gate_parameters.parameters()} == {torch.float32}
    assert layer.router.weight.dtype == torch.bfloat16


def test_double_and_back_moves_every_parameter() -> None:
    gates = GateParameters(DECLARED, 4)
    assert set(dtypes(gates.double()).values()) == {torch.float64}
    assert set(dtypes(gates.float()).values()) == {torch.float32}


def test_gates_move_between_devices() -> None:
    gates = GateParameters(DECLARED, 4).to("meta")
    assert all(parameter.is_meta for parameter in gates.parameters())
    assert dtypes(gates.to(torch.bfloat16)) == NARROW
    gates.to_empty(device="cpu").reset_parameters()
    assert torch.equal(gates.get_parameter("rate"), torch.ones(3))


def test_gradients_follow_their_parameters() -> None:
    gates = GateParameters(DECLARED, 4)
    sum(parameter.sum() for parameter in gates.parameters()).backward()  # type: ignore[union-attr]
    gates.bfloat16()
    for name, parameter in gates.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype == NARROW[name]


def test_each_memory_has_its_own_draw() -> None:
    own = GateParameters(DECLARED, 4).get_parameter("own")
    assert own.shape == (4, 3)
    assert len({tuple(row.tolist()) for row in own}) == 4


def test_slots_read_the_row_of_their_memory() -> None:
    gates = GateParameters(DECLARED, 4)
    read = gates.of_slots(lambda: torch.tensor([[2, 2, 0]]))
    assert torch.equal(read["own"], gates.get_parameter("own")[[2, 2, 0]][None])
    assert read["rate"] is gates.get_parameter("rate")


@pytest.mark.parametrize("copied", [False, True])
def test_weight_decay_is_declared_on_the_parameter(copied: bool) -> None:
    gates = GateParameters(DECLARED, 4)
    gates = copy.deepcopy(gates) if copied else gates
    assert gates.get_parameter("rate").no_weight_decay
    assert not gates.get_parameter("plain").no_weight_decay


def test_weight_decay_is_still_declared_after_a_move() -> None:
    gates = GateParameters(DECLARED, 4).to("meta").to_empty(device="cpu").bfloat16()
    assert gates.get_parameter("rate").no_weight_decay
