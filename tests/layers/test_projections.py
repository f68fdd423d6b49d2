from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from linear_moe.layers import projections
from linear_moe.layers.projections import grouped_linear, xavier_init_

LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=4)


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def dense(x: Tensor, weight: Tensor, cu_groups: Tensor) -> Tensor:
    """Row by row."""
    rows = x.new_zeros(x.shape[0], weight.shape[1])
    for group, matrix in enumerate(weight):
        for row in range(int(cu_groups[group]), int(cu_groups[group + 1])):
            rows[row] = matrix @ x[row]
    return rows


@given(LENGTHS, st.integers(0, 3), st.sampled_from([(4, 8), (8, 4), (3, 5), (8, 1)]))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_row_meets_the_matrix_of_its_group(
    dtype: torch.dtype, lengths: list[int], trailing: int, sizes: tuple[int, int]
) -> None:
    cu_groups = borders(lengths)
    x = torch.randn(int(cu_groups[-1]) + trailing, sizes[0], dtype=dtype)
    weight = torch.randn(len(lengths), sizes[1], sizes[0], dtype=dtype)
    expected = dense(x.double(), weight.double(), cu_groups)
    actual = grouped_linear(x, weight, cu_groups)
    assert actual.dtype == dtype
    # The terms' sizes, not the sum's: a sum that cancels has no relative error to speak of.
    scale = dense(x.double().abs(), weight.double().abs(), cu_groups)
    assert bool(((actual.double() - expected).abs() <= 4 * torch.finfo(dtype).eps * scale).all())


@given(LENGTHS, st.integers(0, 3))
def test_gradients_are_those_of_the_dense_answer(lengths: list[int], trailing: int) -> None:
    cu_groups = borders(lengths)
    x = torch.randn(int(cu_groups[-1]) + trailing, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(lengths), 3, 4, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(x.shape[0], 3, dtype=torch.float64)
    actual = torch.autograd.grad(grouped_linear(x, weight, cu_groups), (x, weight), cotangent)
    # Zeros that hang on the graph: without a row there is nothing to differentiate.
    reference = dense(x, weight, cu_groups) + 0 * (x.sum() + weight.sum())
    expected = torch.autograd.grad(reference, (x, weight), cotangent)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@given(LENGTHS, st.integers(0, 3), st.sampled_from([4, 0]))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_groups_bias_is_added_to_its_rows(dtype: torch.dtype, lengths: list[int], trailing: int, width: int) -> None:
    """Without any input it is all there is."""
    cu_groups = borders(lengths)
    x = torch.randn(int(cu_groups[-1]) + trailing, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(len(lengths), 4, width, dtype=dtype, requires_grad=True)
    bias = torch.randn(len(lengths), 4, dtype=dtype, requires_grad=True)
    cotangent = torch.randn(x.shape[0], 4, dtype=dtype)
    ones = torch.ones(x.shape[0], 1, dtype=dtype)
    reference = dense(torch.cat([x, ones], -1), torch.cat([weight, bias[..., None]], -1), cu_groups)
    reference = reference + 0 * (x.sum() + weight.sum() + bias.sum())
    actual = grouped_linear(x, weight, cu_groups, bias=bias)
    torch.testing.assert_close(actual, reference)
    given = (x, weight, bias)
    for one, other in zip(
        torch.autograd.grad(actual, given, cotangent), torch.autograd.grad(reference, given, cotangent), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("lengths", [[3, 0, 5], [0, 0, 8], [8, 0, 0], [0, 0, 0]])
def test_torchs_grouped_matmul_and_the_fallback_agree(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    cu_groups = borders(lengths)
    x, weight = torch.randn(10, 8, requires_grad=True), torch.randn(3, 4, 8, requires_grad=True)
    assert projections._grouped_mm_takes(x, weight)
    cotangent = torch.randn(10, 4)
    results = []
    for taken in (True, False):
        monkeypatch.setattr(projections, "_grouped_mm_takes", lambda x, weight, taken=taken: taken)
        product = grouped_linear(x, weight, cu_groups)
        results.append((product, *torch.autograd.grad(product, (x, weight), cotangent)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("covered", [False, True])
@pytest.mark.parametrize("first", [0, 3, 4])
def test_columns_of_a_wider_tensor_may_begin_anywhere(first: int, covered: bool) -> None:
    wide, weight = torch.randn(8, 13), torch.randn(2, 4, 8)
    x, cu_groups = wide[:, first : first + 8], borders([3, 5])
    expected = grouped_linear(x.contiguous(), weight, cu_groups)
    assert torch.equal(grouped_linear(x, weight, cu_groups, covered=covered), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_past_the_last_group_give_0_and_may_be_anything(dtype: torch.dtype) -> None:
    x = torch.randn(6, 8, dtype=dtype)
    x[4:] = float("nan")
    x.requires_grad_()
    weight = torch.randn(2, 4, 8, dtype=dtype, requires_grad=True)
    product = grouped_linear(x, weight, torch.tensor([0, 3, 4]))
    assert not product[4:].any() and not product.isnan().any()
    gradients = torch.autograd.grad(product.sum(), (x, weight))
    assert not gradients[0][4:].any() and not any(gradient.isnan().any() for gradient in gradients)


def test_a_group_without_rows_has_a_gradient_of_0() -> None:
    x, weight = torch.randn(3, 8), torch.randn(3, 4, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(grouped_linear(x, weight, torch.tensor([0, 0, 3, 3])).sum(), weight)
    assert not gradient[0].any() and gradient[1].any() and not gradient[2].any()


def test_an_expanded_gradient_is_taken() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    grouped_linear(x, weight, torch.tensor([0, 2, 4])).sum().backward()
    assert x.grad is not None and weight.grad is not None


def test_autocast_chooses_the_dtype() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert grouped_linear(torch.randn(4, 8), torch.randn(2, 8, 8), torch.tensor([0, 2, 4])).dtype == torch.bfloat16


def test_xavier_takes_the_fan_of_one_matrix() -> None:
    """torch's own would read `[M, out, in]` as a convolution's weight, M its fan."""
    weight = torch.empty(50, 30, 20)
    xavier_init_(weight)
    bound = 2**-2.5 * (6 / (30 + 20)) ** 0.5
    assert 0.999 * bound < weight.abs().max().item() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
