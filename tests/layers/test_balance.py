from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linear_moe.layers import MoMLayer
from linear_moe.layers.balance import BalanceBias, balance_loss, load_fractions, z_loss

ALL = torch.ones(6, dtype=torch.bool)


def test_the_balance_loss_is_1_at_balance() -> None:
    indices = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 0]])
    load = load_fractions(indices, 6, ALL)
    assert load.tolist() == pytest.approx([1 / 6] * 6)
    probabilities = torch.full((6, 6), 1 / 6, dtype=torch.float64)
    assert balance_loss(probabilities, load, ALL).item() == pytest.approx(1, abs=1e-6)


def test_the_balance_loss_is_m_when_all_goes_to_one() -> None:
    indices, probabilities = torch.zeros(6, 1, dtype=torch.int64), torch.eye(4)[torch.zeros(6, dtype=torch.int64)]
    assert balance_loss(probabilities, load_fractions(indices, 4, ALL), ALL).item() == 4


@given(st.integers(1, 9), st.integers(1, 5), st.data())
def test_the_balance_loss_is_its_closed_form(tokens: int, num_choices: int, data: st.DataObject) -> None:
    """M sum_m f_m P_m with f_m = slots of m / (top_k tokens) and P_m the mean score, over real tokens."""
    top_k = data.draw(st.integers(1, num_choices))
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    scores = torch.randn(tokens, num_choices, dtype=torch.float64).softmax(-1)
    indices = scores.topk(top_k).indices
    kept = [token for token in range(tokens) if valid[token]]
    expected = 0.0
    for m in range(num_choices):
        slots = sum(m in indices[token].tolist() for token in kept)
        mean = sum(scores[token, m].item() for token in kept) / max(len(kept), 1)
        expected += num_choices * slots / max(top_k * len(kept), 1) * mean
    actual = balance_loss(scores, load_fractions(indices, num_choices, valid), valid)
    assert actual.item() == pytest.approx(expected, rel=1e-6)


def test_the_gradient_of_the_balance_loss_flows_through_the_scores_alone() -> None:
    scores = torch.randn(6, 3).softmax(-1).requires_grad_()
    load = load_fractions(scores.topk(2).indices, 3, ALL)
    (gradient,) = torch.autograd.grad(balance_loss(scores, load, ALL), scores)
    torch.testing.assert_close(gradient, (3 * load / 6).expand(6, 3))


def test_the_z_loss_is_the_mean_squared_logsumexp_of_real_tokens() -> None:
    logits = torch.tensor([[0.0, 0.0], [3.0, 3.0], [100.0, -100.0]])
    valid = torch.tensor([True, True, False])
    expected = (math.log(2) ** 2 + (3 + math.log(2)) ** 2) / 2
    assert z_loss(logits, valid).item() == pytest.approx(expected)


def test_the_balance_bias_moves_by_its_rate_against_the_excess_of_all_forwards_since() -> None:
    """2408.15664, algorithm 1: b_i += u sign(mean load - load_i)."""
    bias = BalanceBias(3, rate=0.1)
    bias.observe(torch.tensor([1.0, 0.0, 0.0]))
    bias.observe(torch.tensor([0.0, 0.5, 0.5]))
    bias.update_balance_bias()
    torch.testing.assert_close(bias.bias, torch.tensor([-0.1, 0.1, 0.1]))
    assert not bias.pending.any()
    bias.update_balance_bias()
    torch.testing.assert_close(bias.bias, torch.tensor([-0.1, 0.1, 0.1]))


def test_the_balance_bias_is_saved_and_what_is_pending_is_not() -> None:
    assert list(BalanceBias(3, 0.1).state_dict()) == ["bias"]


def test_the_balance_bias_spreads_a_router_that_prefers_one_memory() -> None:
    layer = MoMLayer(8, num_memories=4, top_k=1, num_heads=1, head_dim=4, balance_bias_rate=0.05, balance_weight=0.0)
    x = torch.randn(2, 32, 8)
    x[..., 0] = 3
    with torch.no_grad():
        layer.router.weight[0, 0] += 1
    loads = []
    for _ in range(30):
        layer(x)
        layer.update_balance_bias()
        assert layer.routing is not None
        loads.append(layer.routing.load.max().item())
    assert loads[0] > 0.9
    assert min(loads[-5:]) < 0.5


def test_update_balance_bias_is_nothing_without_a_rate() -> None:
    MoMLayer(8, num_heads=1, head_dim=4).update_balance_bias()
