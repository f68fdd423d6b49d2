"""A router's logits from the kernel."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICE, DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st

from linear_moe.kernels import router_logits as kernels
from linear_moe.kernels.router_logits import router_logits
from linear_moe.testing.budget import assert_within_budget


def draw(tokens: int, choices: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, size, device=DEVICE), torch.randn(choices, size, device=DEVICE)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=20)
@given(tokens=st.integers(0, 130), choices=st.integers(1, 40), size=st.integers(1, 150))
def test_it_is_the_product(dtype: torch.dtype, tokens: int, choices: int, size: int) -> None:
    x, weight = draw(tokens, choices, size, dtype)
    logits = router_logits(x, weight)
    assert logits.dtype == torch.float32
    seed = torch.randn_like(logits)

    def measured(dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        inputs = [y.detach().to(dtype or y.dtype).requires_grad_() for y in (x, weight)]
        wide = [y.to(torch.promote_types(y.dtype, torch.float32)) for y in inputs]
        made = router_logits(*inputs) if dtype is None else wide[0] @ wide[1].t()
        gradients = torch.autograd.grad(made, inputs, seed.to(made.dtype))
        return {"logits": made.detach(), "d_x": gradients[0], "d_weight": gradients[1]}

    candidate, reference, exact = measured(None), measured(dtype), measured(torch.float64)
    # Sums of either sign, of which the rounding is that of what they are sums of.
    a, b, d = (y.detach().double().abs() for y in (x, weight, seed))
    terms = {"logits": a @ b.t(), "d_x": d @ b, "d_weight": d.t() @ a}
    # The logits are float32 whatever the input's dtype, and so is their budget.
    logits = [{"logits": made["logits"]} for made in (candidate, reference, exact)]
    assert_within_budget(*logits, torch.float32, terms)
    assert_within_budget(candidate, reference, exact, dtype, terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_beside_any_others(dtype: torch.dtype) -> None:
    x, weight = draw(3 * kernels.ROWS + 5, 6, 100, dtype)
    together = router_logits(x, weight)
    for begin, end in ((0, 1), (7, 9), (kernels.ROWS - 1, 2 * kernels.ROWS + 3)):
        assert torch.equal(router_logits(x[begin:end], weight), together[begin:end])


def test_what_torch_asks_of_an_operator() -> None:
    torch.library.opcheck(kernels._logits, draw(9, 3, 20, torch.float32))
