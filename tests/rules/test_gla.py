"""What GLA's paper (2312.06635) fixes: a decay a key channel, through a bottleneck of 16, its log divided by 16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from linear_moe import ops
from linear_moe.rules import GLA, RuleDims

DIMS = RuleDims(hidden_size=8, num_heads=2, num_value_heads=4, head_dim=3, head_value_dim=5)


def test_the_gate_has_rank_16_and_a_bias() -> None:
    gate = GLA(DIMS).projections()["decay"]
    assert (gate.rank, gate.bias, gate.width) == (16, True, 4 * 3)
    assert not gate.conv
    assert gate.activation is None
    assert GLA(DIMS, gate_rank=5).projections()["decay"].rank == 5


def test_the_decay_is_a_sigmoid_to_the_power_of_a_sixteenth() -> None:
    raw = {"decay": torch.randn(1, 7, 12).double() * 4}
    log_decay = GLA(DIMS).gates(raw, {})["log_decay"]
    torch.testing.assert_close(log_decay.exp(), torch.sigmoid(raw["decay"]).unflatten(-1, (4, 3)) ** (1 / 16))
    wide = GLA(DIMS, gate_divisor=2.0).gates(raw, {})["log_decay"]
    torch.testing.assert_close(wide, 8 * log_decay)


def test_the_decay_of_bfloat16_projections_is_float32() -> None:
    log_decay = GLA(DIMS).gates({"decay": torch.randn(1, 7, 12).bfloat16()}, {})["log_decay"]
    assert log_decay.dtype == torch.float32


def test_short_conv_is_an_option() -> None:
    plain, convolved = GLA(DIMS).projections(), GLA(DIMS, short_conv=True).projections()
    assert not any(spec.conv for spec in plain.values())
    assert {name for name, spec in convolved.items() if spec.conv and spec.activation == "silu"} == {"q", "k", "v"}


@pytest.mark.parametrize("impl", ["chunked", "recurrent"])
def test_op_equals_fla(impl: str, fla: Callable, same_as_fla: Callable) -> None:
    naive = fla("gla").naive_recurrent_gla
    tensors = {name: torch.randn(2, 37, 3, 4).double() for name in "qkv"} | {
        "log_decay": -torch.rand(2, 37, 3, 4).double() * 3,
        "initial_state": torch.randn(2, 3, 4, 4).double(),
    }
    same_as_fla(
        lambda **x: ops.gla(**x, return_final_state=True, impl=impl),
        lambda q, k, v, log_decay, initial_state: naive(q, k, v, log_decay, initial_state, output_final_state=True),
        tensors,
    )


@pytest.mark.parametrize(("name", "value"), [("gate_rank", 0), ("gate_divisor", 0.0), ("gate_divisor", -1.0)])
def test_bad_options(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be (at least 1|above 0), got {value}"):
        GLA(DIMS, **{name: value})
