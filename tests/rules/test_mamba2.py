"""What Mamba2's paper (2405.21060) and code fix: starting ranges, groups that share B and C, a convolution with bias, D x."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe import ops
from linear_moe.rules import Mamba2, RuleDims

DIMS = RuleDims(hidden_size=8, num_heads=4, num_value_heads=4, head_dim=3, head_value_dim=5)


def _starts(name: str) -> Tensor:
    """Many draws of a parameter's start."""
    return Mamba2(DIMS).parameters()[name].init((4096,))


def test_starting_values() -> None:
    rates = _starts("A_log").exp()
    assert rates.min() >= 1 and rates.max() <= 16
    # Uniform in A itself, not in its logarithm.
    assert rates.mean() == pytest.approx(8.5, abs=0.4)
    steps = F.softplus(_starts("dt_bias"))
    assert steps.min() >= 1e-3 * 0.999 and steps.max() <= 0.1 * 1.001
    assert steps.log().mean() == pytest.approx((torch.tensor([1e-3, 0.1]).log().mean()).item(), abs=0.1)
    assert torch.equal(_starts("D"), torch.ones(4096))


def test_parameters_are_a_head_and_stay_float32_without_weight_decay() -> None:
    for spec in Mamba2(DIMS).parameters().values():
        assert spec.shape == (4,)
        assert spec.fp32
        assert not spec.weight_decay


def test_groups_share_b_and_c() -> None:
    rule = Mamba2(DIMS, num_groups=2)
    widths = {name: spec.width for name, spec in rule.projections().items()}
    assert widths == {"C": 2 * 3, "B": 2 * 3, "x": 4 * 5, "dt": 4}
    raw = {name: torch.randn(1, 6, width).double() for name, width in widths.items()}
    parameters = {name: spec.init(spec.shape).double() for name, spec in rule.parameters().items()}
    tokens = rule.tokens(raw, parameters, torch.arange(6)[None])
    assert tokens.q.shape == tokens.k.shape == (1, 6, 2, 3)
    assert tokens.v.shape == (1, 6, 4, 5)


def test_c_b_and_x_are_convolved_with_a_bias_and_dt_is_not() -> None:
    projections = Mamba2(DIMS).projections()
    for name in "CBx":
        assert projections[name].conv and projections[name].conv_bias and projections[name].activation == "silu"
    assert not projections["dt"].conv
    assert not projections["C"].per_memory


def test_tokens_are_the_papers() -> None:
    """log a = -exp(A_log) dt, v = dt x, dt = softplus(x_dt + dt_bias), a scale of 1, and D x beside the read."""
    rule = Mamba2(DIMS)
    raw = {name: torch.randn(1, 6, spec.width).double() for name, spec in rule.projections().items()}
    parameters = {name: spec.init(spec.shape).double() for name, spec in rule.parameters().items()}
    parameters["D"] = torch.randn(4).double()
    tokens = rule.tokens(raw, parameters, torch.arange(6)[None])
    dt = F.softplus(raw["dt"] + parameters["dt_bias"])
    x = raw["x"].unflatten(-1, (4, 5))
    assert tokens.log_decay is not None
    torch.testing.assert_close(tokens.log_decay, -parameters["A_log"].exp() * dt)
    torch.testing.assert_close(tokens.v, dt[..., None] * x)
    assert rule.scale == 1
    read = torch.randn(1, 6, 4, 5).double()
    torch.testing.assert_close(rule.output(read, tokens, parameters), read + parameters["D"][:, None] * x)


@pytest.mark.parametrize("impl", ["chunked", "recurrent"])
def test_op_equals_fla(impl: str, fla: Callable, same_as_fla: Callable) -> None:
    """Theirs is the form of scalar decay; Mamba2's names are put into its words here, once more."""
    naive = fla("simple_gla").naive_recurrent_simple_gla
    heads, groups = 4, 2
    tensors = {
        "C": torch.randn(2, 40, groups, 3),
        "B": torch.randn(2, 40, groups, 3),
        "x": torch.randn(2, 40, heads, 5),
        "dt": torch.rand(2, 40, heads) + 0.01,
        "A": -torch.rand(heads) * 16,
        "D": torch.randn(heads),
        "initial_state": torch.randn(2, heads, 3, 5),
    }

    def theirs(
        C: Tensor, B: Tensor, x: Tensor, dt: Tensor, A: Tensor, D: Tensor, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        C, B = (y.repeat_interleave(heads // groups, 2) for y in (C, B))
        read, final = naive(C, B, x * dt[..., None], A * dt, scale=1.0, initial_state=initial_state)
        return read + D[:, None] * x, final

    same_as_fla(
        lambda **y: ops.mamba2(**y, return_final_state=True, impl=impl),
        theirs,
        {name: y.double() for name, y in tensors.items()},
    )


@pytest.mark.parametrize("groups", [0, 3])
def test_groups_must_divide_the_heads(groups: int) -> None:
    with pytest.raises(ValueError, match=rf"num_groups must divide the 4 heads of mamba2, got {groups}"):
        Mamba2(DIMS, num_groups=groups)
