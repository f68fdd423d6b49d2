"""What DeltaNet's papers (2102.11174, 2406.06484) fix: keys and queries of norm 1, a write that replaces what was there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe import ops
from linear_moe.rules import DeltaNet, RuleDims
from linear_moe.rules.transforms import l2_norm

DIMS = RuleDims(hidden_size=8, num_heads=2, num_value_heads=4, head_dim=3, head_value_dim=5)


@pytest.mark.parametrize(("negative", "most"), [(False, 1.0), (True, 2.0)])
def test_beta_is_a_sigmoid_of_at_most_1_or_2(negative: bool, most: float) -> None:
    raw = {"beta": torch.linspace(-60, 60, 9).double()}
    beta = DeltaNet(DIMS, allow_negative_eigenvalues=negative).gates(raw, {})["beta"]
    torch.testing.assert_close(beta, most * torch.sigmoid(raw["beta"]))
    assert beta.min() >= 0 and beta.max() <= most


def test_queries_and_keys_have_norm_1() -> None:
    q, k = DeltaNet(DIMS).qk_transform(*(5 * torch.randn(2, 1, 9, 2, 3).double()), torch.arange(9)[None])
    for x in (q, k):
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(1, 9, 2).double(), atol=1e-5, rtol=0)


def test_the_norm_of_nothing_has_a_gradient() -> None:
    x = torch.zeros(4, requires_grad=True)
    l2_norm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_q_k_and_v_are_convolved_unless_told_otherwise() -> None:
    projections = DeltaNet(DIMS).projections()
    assert {name for name, spec in projections.items() if spec.conv and spec.activation == "silu"} == {"q", "k", "v"}
    assert not any(spec.conv for spec in DeltaNet(DIMS, short_conv=False).projections().values())
    assert projections["beta"].width == 4


def test_a_write_of_strength_1_replaces_the_value_of_its_key() -> None:
    """Read with the key just written, the state gives the value just written, whatever it held."""
    k, v = F.normalize(torch.randn(1, 9, 2, 3).double(), dim=-1), torch.randn(1, 9, 2, 5).double()
    state = torch.randn(1, 2, 3, 5).double()
    output = ops.deltanet(k, k, v, torch.ones(1, 9, 2).double(), scale=1.0, initial_state=state).output
    torch.testing.assert_close(output, v)


def test_a_write_of_strength_2_turns_the_sign_along_its_key() -> None:
    k, v = F.normalize(torch.randn(1, 1, 2, 3).double(), dim=-1), torch.zeros(1, 1, 2, 5).double()
    state = torch.randn(1, 2, 3, 5).double()
    beta = torch.full((1, 1, 2), 2.0).double()
    turned = ops.deltanet(k, k, v, beta, scale=1.0, initial_state=state).output
    torch.testing.assert_close(turned[:, 0], -torch.einsum("bhk,bhkv->bhv", k[:, 0], state))


@pytest.mark.parametrize("impl", ["chunked", "recurrent"])
def test_op_equals_fla(impl: str, fla: Callable, same_as_fla: Callable) -> None:
    naive = fla("delta_rule").delta_rule_recurrence
    tensors = {name: torch.randn(2, 40, 3, width).double() for name, width in (("q", 4), ("k", 4), ("v", 5))}
    tensors["k"] = F.normalize(tensors["k"], dim=-1)
    tensors |= {"beta": 2 * torch.rand(2, 40, 3).double(), "initial_state": torch.randn(2, 3, 4, 5).double()}

    def theirs(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
        output, final = naive(*(x.transpose(1, 2) for x in (q, k, v, beta)), initial_state=initial_state)
        return output.transpose(1, 2), final

    same_as_fla(lambda **x: ops.deltanet(**x, return_final_state=True, impl=impl), theirs, tensors)
