from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from linear_moe.layers import Router, Routing
from linear_moe.layers.routing import best_first, ordered_sum, sort_slots


def route(router: Router, x: Tensor, valid: Tensor | None = None) -> Routing:
    valid = torch.ones(x.shape[0], dtype=torch.bool) if valid is None else valid
    routing, *_ = router(x, valid)
    return routing


def router_with_logits(top_k: int, num_choices: int, **options: object) -> Router:
    """A router of `num_choices` inputs whose logits are its input, in float64."""
    router = Router(num_choices, num_choices, top_k, dtype=torch.float64, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_choices))
    return router


@given(width=st.integers(1, 65), rows=st.integers(1, 9), dtype=st.sampled_from((torch.float32, torch.float64)))
def test_ordered_sum_gives_the_same_bits_whatever_stands_beside_a_row(
    width: int, rows: int, dtype: torch.dtype
) -> None:
    x = torch.randn(rows, 3, width, dtype=dtype)
    together = ordered_sum(x)
    assert all(torch.equal(ordered_sum(x[i : i + 1])[0], together[i]) for i in range(rows))
    error = (together.double() - x.double().sum(-1)).abs()
    assert bool((error <= torch.finfo(dtype).eps * x.double().abs().sum(-1) * math.ceil(math.log2(width) + 1)).all())


def test_ordered_sum_differentiates_to_ones() -> None:
    x = torch.randn(4, 7, requires_grad=True)
    (gradient,) = torch.autograd.grad(ordered_sum(x).sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_token_is_routed_alike_alone_and_among_others(dtype: torch.dtype) -> None:
    router, x = Router(24, 6, 3, dtype=dtype), torch.randn(40, 24, dtype=dtype)
    together = route(router, x)
    for start in range(0, 40, 7):
        part = route(router, x[start : start + 7])
        assert torch.equal(part.indices, together.indices[start : start + 7])
        assert torch.equal(part.weights, together.weights[start : start + 7])


@pytest.mark.parametrize("dtype, wide", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_scores_are_computed_in_at_least_float32(dtype: torch.dtype, wide: torch.dtype) -> None:
    router, x = Router(16, 4, 2, dtype=dtype), torch.randn(9, 16, dtype=dtype)
    routing = route(router, x)
    expected = torch.softmax(x.double() @ router.weight.double().T, -1).topk(2)
    weights = expected.values / expected.values.sum(-1, keepdim=True)
    assert routing.weights.dtype == wide
    assert torch.equal(routing.indices, expected.indices)
    assert (routing.weights - weights).abs().max() < 4 * torch.finfo(wide).eps


def test_autocast_leaves_the_router_its_bits() -> None:
    router, x = Router(16, 4, 2), torch.randn(9, 16)
    plain = route(router, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = route(router, x)
    assert cast.weights.dtype == torch.float32
    assert torch.equal(cast.weights, plain.weights) and torch.equal(cast.indices, plain.indices)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_are_the_picked_scores(score: str, top_k: int, renormalize: bool) -> None:
    router = router_with_logits(top_k, 4, score=score, renormalize=renormalize)
    logits = torch.tensor([[0.1, 2.0, -1.0, 0.5]], dtype=torch.float64)
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    routing = route(router, logits)
    picked = scores.sort(descending=True).values[:, :top_k]
    # One picked of several keeps p: renormalised it would be 1, and the router would learn nothing.
    expected = picked / picked.sum() if renormalize and top_k > 1 else picked
    assert routing.indices.tolist() == [[1, 3, 0, 2][:top_k]]
    torch.testing.assert_close(routing.weights, expected, rtol=1e-14, atol=0)


def test_a_shared_choice_stands_behind_the_picks_and_is_in_no_statistic() -> None:
    router, x, valid = Router(8, 4, 2, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64), torch.ones(5) > 0
    (plain, loss, _), (shared, same_loss, _) = router(x, valid), router(x, valid, shared=True)
    assert torch.equal(shared.indices, torch.cat((plain.indices, torch.full((5, 1), 4)), -1))
    assert torch.equal(shared.weights, torch.cat((plain.weights, torch.ones(5, 1)), -1))
    assert torch.equal(shared.load, plain.load) and torch.equal(loss, same_loss)


def test_one_choice_of_one_has_weight_1() -> None:
    assert torch.equal(route(Router(5, 1, 1), torch.randn(3, 5)).weights, torch.ones(3, 1))


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_picks_are_the_largest_best_first(choices: int, count: int, data: st.DataObject) -> None:
    """Few numbers, so that there are ties."""
    rows = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=choices, max_size=choices)
    scores = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=4)))
    count = min(count, choices)
    expected = [sorted(range(choices), key=lambda at: (-row[at], at))[:count] for row in scores.tolist()]
    assert best_first(scores, count).tolist() == expected


def test_ties_go_to_the_lowest_index() -> None:
    router = router_with_logits(3, 6)
    logits = torch.tensor([[0.0] * 6, [1, 2, 1, 2, 1, 2], [0, 0, 0, 5, 5, 0]], dtype=torch.float64)
    assert route(router, logits).indices.tolist() == [[0, 1, 2], [1, 3, 5], [3, 4, 0]]


def test_a_pick_whose_weight_underflows_is_still_counted() -> None:
    router = Router(3, 3, 2)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    routing = route(router, torch.tensor([[0.0, -200.0, -300.0]]))
    assert routing.indices.tolist() == [[0, 1]]
    assert routing.weights.tolist() == [[1.0, 0.0]]
    assert routing.load.tolist() == [0.5, 0.5, 0.0]


def test_sigmoid_scores_that_all_underflow_stay_finite() -> None:
    router = Router(3, 3, 2, score="sigmoid")
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    routing, loss, _ = router(torch.full((1, 3), -200.0), torch.ones(1, dtype=torch.bool))
    assert routing.weights.isfinite().all() and loss.isfinite() and routing.entropy.isfinite()
    (routing.weights.sum() + loss).backward()
    assert router.weight.grad is not None and router.weight.grad.isfinite().all()


def test_entropy_is_log_m_when_undecided_and_0_when_certain() -> None:
    router = router_with_logits(2, 4)
    assert route(router, torch.zeros(5, 4, dtype=torch.float64)).entropy.item() == pytest.approx(math.log(4))
    certain = torch.eye(4, dtype=torch.float64) * 1000
    assert route(router, certain).entropy.item() == pytest.approx(0, abs=1e-12)


def test_statistics_leave_pads_out() -> None:
    router, x = Router(8, 4, 2, dtype=torch.float64, z_loss_weight=0.1), torch.randn(10, 8, dtype=torch.float64)
    valid = torch.rand(10) > 0.4
    garbage = torch.where(valid[:, None], x, torch.full_like(x, 1e3))
    (with_pads, loss, _), (alone, loss_alone, _) = router(garbage, valid), router(x[valid], valid[valid])
    for name in ("load", "entropy", "balance_loss", "z_loss"):
        torch.testing.assert_close(getattr(with_pads, name), getattr(alone, name), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, loss_alone, rtol=1e-12, atol=0)


def test_no_real_token_gives_zero_statistics_and_gradients() -> None:
    router = Router(8, 4, 2, z_loss_weight=0.1)
    routing, loss, _ = router(torch.zeros(3, 8), torch.zeros(3, dtype=torch.bool))
    assert [routing.load.sum().item(), routing.entropy.item(), loss.item()] == [0, 0, 0]
    loss.backward()
    assert router.weight.grad is not None and not router.weight.grad.any()


def test_statistics_carry_no_graph() -> None:
    routing = route(Router(8, 4, 2), torch.randn(3, 8))
    fields = (routing.load, routing.entropy, routing.balance_loss, routing.z_loss, routing.indices)
    assert not any(tensor.requires_grad for tensor in fields)


def test_the_selection_bias_moves_picks_and_not_weights() -> None:
    router = router_with_logits(1, 3, balance_bias_rate=0.5, renormalize=False)
    assert router.bias is not None
    router.bias.bias.copy_(torch.tensor([0.0, 0.0, 10.0]))
    logits = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    routing = route(router, logits)
    assert routing.indices.tolist() == [[2]]
    torch.testing.assert_close(routing.weights, logits.softmax(-1)[:, 2:])


def test_loads_are_observed_in_training_only() -> None:
    router = router_with_logits(1, 3, balance_bias_rate=0.5)
    assert router.bias is not None
    route(router.eval(), torch.randn(5, 3, dtype=torch.float64))
    assert not router.bias.pending.any()
    route(router.train(), torch.randn(5, 3, dtype=torch.float64))
    assert router.bias.pending.sum().item() == pytest.approx(1)


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 5))
def test_slots_are_sorted_stably_and_counted(groups: list[int], num_groups: int) -> None:
    groups = [min(group, num_groups) for group in groups]
    plan = sort_slots(torch.tensor(groups, dtype=torch.int64), num_groups)
    expected = sorted(range(len(groups)), key=lambda slot: groups[slot])
    assert plan.order.tolist() == expected
    assert [plan.order.tolist()[place] for place in plan.place.tolist()] == list(range(len(groups)))
    assert plan.cu_seqlens.tolist() == [sum(g < border for g in groups) for border in range(num_groups + 1)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((8, 4, 5), r"top_k must be .*in \[1, num_memories = 4\], got 5"),
        ((8, 4, 0), r"top_k must be .*in \[1, num_memories = 4\], got 0"),
        ((8, 0, 0), "num_memories must be .*at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Router(*arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"score": "softmx"}, "router_score must be one of softmax, sigmoid, got 'softmx'"),
        ({"balance_weight": -1.0}, "balance_weight must be a finite number of at least 0, got -1.0"),
        ({"balance_weight": math.nan}, "balance_weight must be a finite number of at least 0, got nan"),
        ({"balance_weight": math.inf}, "balance_weight must be a finite number of at least 0, got inf"),
        ({"balance_weight": "0.1"}, "balance_weight must be a finite number of at least 0, got '0.1'"),
        ({"z_loss_weight": -1.0}, "z_loss_weight must be a finite number of at least 0, got -1.0"),
        ({"z_loss_weight": math.nan}, "z_loss_weight must be a finite number of at least 0, got nan"),
        ({"z_loss_weight": math.inf}, "z_loss_weight must be a finite number of at least 0, got inf"),
        ({"z_loss_weight": "0.1"}, "z_loss_weight must be a finite number of at least 0, got '0.1'"),
        ({"balance_bias_rate": -1.0}, "balance_bias_rate must be a finite number of at least 0, got -1.0"),
        ({"balance_bias_rate": math.nan}, "balance_bias_rate must be a finite number of at least 0, got nan"),
        ({"balance_bias_rate": math.inf}, "balance_bias_rate must be a finite number of at least 0, got inf"),
        ({"balance_bias_rate": "0.1"}, "balance_bias_rate must be a finite number of at least 0, got '0.1'"),
        ({"auxiliary": "add"}, "auxiliary must be one of attach, collect, got 'add'"),
    ],
)
def test_options_that_do_not_exist_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Router(8, 4, 2, **options)  # type: ignore[arg-type]
