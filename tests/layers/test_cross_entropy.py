"""The loss in blocks is the loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from linear_moe.layers import cross_entropy
from linear_moe.layers.cross_entropy import summed_cross_entropy


def _inputs(tokens: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + 100 * vocabulary)
    hidden = torch.randn(tokens, 6, dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, 6, dtype=dtype, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=generator)


@settings(max_examples=40)
@given(st.integers(0, 12), st.integers(1, 9), st.integers(1, 5))
def test_loss_and_gradients_are_those_of_all_logits_at_once(tokens: int, vocabulary: int, rows: int) -> None:
    hidden, weight, labels = _inputs(tokens, vocabulary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "LOGITS_AT_ONCE", rows * vocabulary)
        loss = summed_cross_entropy(hidden, weight, labels)
    wanted = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(loss, wanted)
    came = torch.autograd.grad(3 * loss, (hidden, weight))
    for gradient, other in zip(came, torch.autograd.grad(3 * wanted, (hidden, weight)), strict=True):
        torch.testing.assert_close(gradient, other)


def test_gradcheck() -> None:
    hidden, weight, labels = _inputs(4, 3)
    assert torch.autograd.gradcheck(lambda h, w: summed_cross_entropy(h, w, labels), (hidden, weight))
    assert torch.autograd.gradcheck(lambda h: summed_cross_entropy(h, weight.detach(), labels), (hidden,))
    assert torch.autograd.gradcheck(lambda w: summed_cross_entropy(hidden.detach(), w, labels), (weight,))


def test_large_logits_are_no_trouble() -> None:
    hidden, weight, labels = _inputs(5, 4, torch.float32)
    loss = summed_cross_entropy(hidden * 1e4, weight, labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()


def test_autocast_makes_the_products_narrow_and_leaves_the_loss_wide() -> None:
    hidden, weight, labels = _inputs(50, 40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_cross_entropy(hidden, weight, labels)
    assert loss.dtype == torch.float32
    wanted = F.cross_entropy((hidden.bfloat16() @ weight.bfloat16().T).float(), labels, reduction="sum")
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    came = torch.autograd.grad(loss, (hidden, weight))
    for gradient, other in zip(came, torch.autograd.grad(wanted, (hidden, weight)), strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, other, rtol=0.05, atol=0.05)


def test_without_gradients_none_are_made() -> None:
    hidden, weight, labels = _inputs(5, 4)
    with torch.no_grad():
        loss = summed_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, labels, reduction="sum").detach())


def test_a_scale_that_16_bits_round_is_not_rounded() -> None:
    """1 / 300 in bfloat16 is 0.2% off, and so would every gradient below the head be."""
    hidden, weight = torch.randn(40, 16).bfloat16().requires_grad_(), torch.randn(11, 16)
    labels = torch.randint(11, (40,))
    (summed_cross_entropy(hidden, weight.bfloat16(), labels) / 300).backward()
    exact = hidden.detach().double().requires_grad_()
    (summed_cross_entropy(exact, weight.bfloat16().double(), labels) / 300).backward()
    assert hidden.grad is not None and exact.grad is not None and hidden.grad.dtype == torch.bfloat16
    factor = (hidden.grad.double() * exact.grad).sum() / exact.grad.square().sum()
    assert abs(float(factor) - 1) < 5e-4
