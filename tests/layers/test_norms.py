"""The output norm and gate: every option is what the definition says, in prefill, decoding and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from linear_moe import MemoryLayer, MoMLayer
from linear_moe.testing.layer_cases import require_definition, require_gradients

OPTIONS: list[dict[str, Any]] = [
    {"output_gate": "sigmoid"},
    {"output_gate": "none"},
    {"output_gate": "none", "norm_groups": 3},
    {"norm_groups": 1},
    {"norm_groups": 2, "gate_before_norm": True},
    {"norm_groups": 6, "output_gate": "sigmoid", "gate_before_norm": True},
    {"gate_before_norm": True},
]


def make(kind: type[MoMLayer] | type[MemoryLayer], **options: Any) -> MoMLayer | MemoryLayer:
    layer = kind(8, num_heads=2, head_dim=4, head_value_dim=3, dtype=torch.float64, **options)
    for parameter in layer.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return layer


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_definition(options: dict[str, Any]) -> None:
    layer, x = make(MoMLayer, **options), torch.randn(2, 7, 8, dtype=torch.float64)
    require_definition(layer, x)
    require_gradients(layer, x)
    one = make(MemoryLayer, **options)
    with torch.no_grad():
        state = one.new_state(2)
        one(x[:, :4], state=state)
        require_definition(one, x[:, 4:], state)


def test_the_options_differ() -> None:
    """From one set of parameters: what is compared above is not one function under seven names."""
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    full = make(MemoryLayer, norm_groups=2).state_dict()
    outputs = []
    for options in OPTIONS[2:6]:
        layer = make(MemoryLayer, **options)
        layer.load_state_dict({name: full[name] for name in layer.state_dict()})
        outputs.append(layer(x))
    for i, output in enumerate(outputs):
        assert all(not torch.allclose(output, other, atol=1e-3) for other in outputs[i + 1 :])


def test_without_a_gate_there_is_no_matrix_for_it() -> None:
    layer = make(MemoryLayer, output_gate="none")
    assert layer.gate_proj is None and not any("gate_proj" in name for name in layer.state_dict())


@pytest.mark.parametrize("gate", ["silu", "sigmoid", "none"])
def test_a_16_bit_layer_stays_one(gate: str) -> None:
    layer = MoMLayer(8, num_heads=2, head_dim=4, output_gate=gate).bfloat16()
    assert layer(torch.randn(1, 5, 8).bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu"):
        y = MoMLayer(8, num_heads=2, head_dim=4, output_gate=gate)(torch.randn(1, 5, 8))
    assert y.dtype == torch.float32 and bool(y.isfinite().all())
