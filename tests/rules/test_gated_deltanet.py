"""What Gated DeltaNet's paper (2412.06464) and code fix: starting ranges of the decay, the delta rule on a faded state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe import ops
from linear_moe.rules import GatedDeltaNet, RuleDims

DIMS = RuleDims(hidden_size=8, num_heads=2, num_value_heads=4, head_dim=3, head_value_dim=5)


def _starts(name: str) -> Tensor:
    """Many draws of a parameter's start."""
    return GatedDeltaNet(DIMS).parameters()[name].init((4096,))


def test_starting_values() -> None:
    logs = _starts("A_log")
    assert logs.isfinite().all()
    rates = logs.exp()
    assert rates.max() <= 16
    assert rates.mean() == pytest.approx(8, abs=0.4)
    steps = F.softplus(_starts("dt_bias"))
    assert steps.min() >= 1e-3 * 0.999 and steps.max() <= 0.1 * 1.001
    # As many steps between 0.001 and 0.01 as between 0.01 and 0.1.
    assert (steps < 0.01).float().mean() == pytest.approx(0.5, abs=0.05)


def test_parameters_are_a_value_head_and_stay_float32_without_weight_decay() -> None:
    for spec in GatedDeltaNet(DIMS).parameters().values():
        assert spec.shape == (4,)
        assert spec.fp32
        assert not spec.weight_decay


@pytest.mark.parametrize("negative", [False, True])
def test_gates_are_the_papers(negative: bool) -> None:
    rule = GatedDeltaNet(DIMS, allow_negative_eigenvalues=negative)
    raw = {"decay": torch.randn(1, 6, 4).double(), "beta": torch.randn(1, 6, 4).double()}
    parameters = {name: spec.init(spec.shape).double() for name, spec in rule.parameters().items()}
    gates = rule.gates(raw, parameters)
    step = (1 + (raw["decay"] + parameters["dt_bias"]).exp()).log()
    torch.testing.assert_close(gates["log_decay"], -parameters["A_log"].exp() * step)
    torch.testing.assert_close(gates["beta"], (2 if negative else 1) * torch.sigmoid(raw["beta"]))


def test_a_start_of_zero_still_fades_nothing_to_nan() -> None:
    """A is drawn from an interval that begins at 0: its logarithm must stay a number."""
    parameters = {"A_log": torch.full((4,), torch.finfo(torch.float32).tiny).log(), "dt_bias": torch.zeros(4)}
    raw = {"decay": torch.randn(1, 3, 4), "beta": torch.randn(1, 3, 4)}
    log_decay = GatedDeltaNet(DIMS).gates(raw, parameters)["log_decay"]
    assert log_decay.isfinite().all()
    assert torch.equal(log_decay.exp(), torch.ones(1, 3, 4))


def test_queries_and_keys_have_norm_1() -> None:
    q, k = GatedDeltaNet(DIMS).qk_transform(*(5 * torch.randn(2, 1, 9, 2, 3).double()), torch.arange(9)[None])
    for x in (q, k):
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(1, 9, 2).double(), atol=1e-5, rtol=0)


def test_the_decay_comes_before_the_erase() -> None:
    """Eq. 10: what a write takes away is what is left after the fading."""
    state = torch.randn(1, 1, 3, 5).double()
    k, v = F.normalize(torch.randn(1, 1, 1, 3).double(), dim=-1), torch.randn(1, 1, 1, 5).double()
    half = torch.full((1, 1, 1), 0.5).double()
    result = ops.gated_deltanet(k, k, v, half.log(), half, initial_state=state, return_final_state=True)
    key, value = k[0, 0, 0], v[0, 0, 0]
    projector = torch.eye(3).double() - 0.5 * torch.outer(key, key)
    assert result.final_state is not None
    torch.testing.assert_close(
        result.final_state[0, 0], projector @ (0.5 * state[0, 0]) + 0.5 * torch.outer(key, value)
    )


@pytest.mark.parametrize("impl", ["chunked", "recurrent"])
def test_op_equals_fla(impl: str, fla: Callable, same_as_fla: Callable) -> None:
    naive = fla("gated_delta_rule").naive_recurrent_gated_delta_rule
    tensors = {name: torch.randn(2, 40, 3, width).double() for name, width in (("q", 4), ("k", 4), ("v", 5))}
    tensors["k"] = F.normalize(tensors["k"], dim=-1)
    tensors |= {
        "log_decay": -3 * torch.rand(2, 40, 3).double(),
        "beta": 2 * torch.rand(2, 40, 3).double(),
        "initial_state": torch.randn(2, 3, 4, 5).double(),
    }
    same_as_fla(
        lambda **x: ops.gated_deltanet(**x, return_final_state=True, impl=impl),
        lambda q, k, v, log_decay, beta, initial_state: naive(
            q, k, v, beta, log_decay, initial_state=initial_state, output_final_state=True
        ),
        tensors,
    )
