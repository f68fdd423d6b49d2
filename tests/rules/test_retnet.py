"""What RetNet's paper (2307.08621) fixes: the decay of each head, and rotary positions on q and k."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from linear_moe import ops
from linear_moe.rules import RetNet, RuleDims, Tokens
from linear_moe.rules.retnet import retention_log_decay
from linear_moe.rules.transforms import rotary

DIMS = RuleDims(hidden_size=8, num_heads=2, num_value_heads=4, head_dim=6, head_value_dim=3)


def _tokens(positions: Tensor, raw: dict[str, Tensor] | None = None) -> Tokens:
    rule, length = RetNet(DIMS), positions.numel()
    raw = raw or {name: torch.randn(1, length, spec.width).double() for name, spec in rule.projections().items()}
    return rule.tokens(raw, {}, positions[None])


def test_the_gamma_of_head_h_is_1_minus_2_to_the_minus_5_minus_h() -> None:
    decays = retention_log_decay(40, torch.device("cpu"))
    for head, log_decay in enumerate(decays.tolist()):
        # log(1 - x) = -x (1 + x / 2 + x^2 / 3 + ...): exact where 1 - x itself rounds to 1 in float32.
        x = Fraction(1, 2 ** (5 + head))
        expected = -sum(x**n / n for n in range(1, 12))
        assert log_decay == pytest.approx(float(expected), rel=1e-7)
        assert log_decay < 0


def test_decays_are_of_value_heads_and_take_no_gate() -> None:
    tokens = _tokens(torch.arange(3))
    assert tokens.log_decay is not None
    torch.testing.assert_close(tokens.log_decay.exp(), 1 - 2.0 ** (-5 - torch.arange(4.0)))
    assert tokens.beta is None
    assert set(RetNet(DIMS).projections()) == {"q", "k", "v"}
    assert RetNet(DIMS).parameters() == {}


def test_products_of_q_and_k_depend_on_the_distance_alone() -> None:
    rule = RetNet(DIMS)
    raw = {name: torch.randn(1, 5, spec.width).double() for name, spec in rule.projections().items()}
    here, later = _tokens(torch.arange(5), raw), _tokens(1000 + torch.arange(5), raw)
    products = [torch.einsum("bthk,bshk->bhts", tokens.q, tokens.k) for tokens in (here, later)]
    torch.testing.assert_close(*products)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(here.q, later.q)


def test_rotary_turns_pairs_by_position_times_frequency() -> None:
    """Eq. 5: x e^(i n theta), theta_j = base^(-2 j / K); no turn at position 0, no change of length anywhere."""
    length, half = 7, 3
    raw = {name: torch.randn(1, length, spec.width).double() for name, spec in RetNet(DIMS).projections().items()}
    turned = _tokens(torch.arange(length), raw).k
    plain = raw["k"].unflatten(-1, (2, 6))
    theta = 10000.0 ** (-torch.arange(half).double() / half)
    angle = torch.arange(length)[:, None, None] * theta
    expected = torch.complex(plain[..., :half], plain[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), -1))
    torch.testing.assert_close(turned[:, 0], plain[:, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_rotations_gradient_is_turned_back(dtype: torch.dtype) -> None:
    """By the definition, and of rows that are a part of longer ones; what is turned keeps its dtype."""
    positions = torch.tensor([[0, 5, 3, 900]])
    x = torch.randn(1, 4, 2, 9, dtype=dtype).requires_grad_()
    seed = torch.randn(1, 4, 2, 6, dtype=dtype)
    made = rotary(x[..., 2:8], positions)
    (gradient,) = torch.autograd.grad(made, x, seed)
    wide = x.detach().double().requires_grad_()
    angle = positions[..., None, None] * 10000.0 ** (-torch.arange(3).double() / 3)
    turned = torch.complex(wide[..., 2:5], wide[..., 5:8]) * torch.polar(torch.ones_like(angle), angle)
    exact = torch.cat((turned.real, turned.imag), -1)
    (expected,) = torch.autograd.grad(exact, wide, seed.double())
    assert made.dtype == gradient.dtype == dtype and made.is_contiguous()
    # A position of 900 in float32 is an angle with an error of its own.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(made.double(), exact, rtol=0, atol=tolerance * 4)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=tolerance * 4)


def test_rope_base_sets_the_slowest_turn() -> None:
    fast = RetNet(DIMS, rope_base=4.0).qk_transform(*torch.ones(2, 1, 9, 2, 6), torch.arange(9)[None])[0]
    slow = RetNet(DIMS).qk_transform(*torch.ones(2, 1, 9, 2, 6), torch.arange(9)[None])[0]
    assert (fast[0, 8, 0, 2] - 1).abs() > 100 * (slow[0, 8, 0, 2] - 1).abs()


def test_op_equals_fla(fla: Callable, same_as_fla: Callable) -> None:
    """Their retention takes no state: the final state is held against the sum that defines it."""
    naive = fla("retention").naive_retention
    shape = (2, 70, 3, 4)
    tensors = {name: torch.randn(shape).double() for name in "qkv"}
    gammas = 1 - 2.0 ** (-5 - torch.arange(3))

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        remaining = gammas ** torch.arange(69, -1, -1)[:, None]
        final = torch.einsum("th,bthk,bthv->bhkv", remaining, k, v)
        return naive(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), final

    for impl in ("chunked", "recurrent"):
        same_as_fla(lambda impl=impl, **x: ops.retnet(**x, return_final_state=True, impl=impl), theirs, tensors)


def test_bad_sizes_and_options() -> None:
    odd = RuleDims(hidden_size=8, num_heads=1, num_value_heads=1, head_dim=3, head_value_dim=3)
    with pytest.raises(ValueError, match=r"head_dim must be even for retnet .* got 3"):
        RetNet(odd)
    with pytest.raises(ValueError, match=r"rope_base must be above 1, got 1"):
        RetNet(DIMS, rope_base=1.0)
