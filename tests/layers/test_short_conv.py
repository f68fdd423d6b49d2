from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from linear_moe.layers.short_conv import short_conv

LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=4)


def definition(
    x: Tensor, weight: Tensor, bias: Tensor | None, borders: list[int], state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Segment by segment, token by token."""
    width = weight.shape[1]
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(borders)):
        past = [x.new_zeros(x.shape[1])] * width if state is None else list(state[n])
        for t in range(start, end):
            past = [*past[1:], x[t]]
            total = sum((weight[:, w] * past[w] for w in range(width)), torch.zeros_like(x[t]))
            outputs.append(total if bias is None else total + bias)
        states.append(torch.stack(past))
    outputs += [x.new_zeros(x.shape[1])] * (x.shape[0] - borders[-1])
    return torch.stack(outputs) if outputs else x, torch.stack(states)


@given(LENGTHS, st.integers(0, 2), st.integers(1, 5), st.booleans(), st.booleans())
def test_it_is_the_definition_with_all_its_gradients(
    lengths: list[int], trailing: int, width: int, biased: bool, carried: bool
) -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    borders = torch.tensor([0, *lengths]).cumsum(0)
    x, weight = draw(int(borders[-1]) + trailing, 3), draw(3, width)
    bias = draw(3) if biased else None
    state = draw(len(lengths), width, 3) if carried else None
    actual = short_conv(x, weight, bias, borders, state)
    expected = definition(x, weight, bias, borders.tolist(), state)
    inputs = [tensor for tensor in (x, weight, bias, state) if tensor is not None]
    cotangents = [torch.randn_like(tensor) for tensor in expected]

    def gradients(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Zeros that hang on the graph: without a token there is nothing to differentiate.
        total = 0 * sum(tensor.sum() for tensor in inputs)
        total = sum(((output * c).sum() for output, c in zip(outputs, cotangents, strict=True)), total)
        return torch.autograd.grad(total, inputs)  # type: ignore[arg-type]

    for one, other in zip((*actual, *gradients(actual)), (*expected, *gradients(expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_the_state_of_a_segment_without_tokens_keeps_its_bits(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """In a wider state too, as that of a float32 layer decoding under autocast."""
    state = torch.randn(3, 4, 2, dtype=state_dtype)
    _, after = short_conv(torch.randn(5, 2, dtype=dtype), torch.randn(2, 4), None, torch.tensor([0, 5, 5, 5]), state)
    assert torch.equal(after[1:], state[1:])
    assert not torch.equal(after[0], state[0])


def test_no_tokens_at_all_keep_the_whole_state() -> None:
    state = torch.randn(2, 4, 3)
    output, after = short_conv(torch.randn(0, 3), torch.randn(3, 4), None, torch.tensor([0, 0, 0]), state)
    assert output.shape == (0, 3)
    assert torch.equal(after, state)


def test_a_segments_neighbours_do_not_matter() -> None:
    x, weight, borders = torch.randn(9, 2), torch.randn(2, 4), torch.tensor([0, 4, 9])
    output, _ = short_conv(x, weight, None, borders, None)
    poisoned = x.clone()
    poisoned[:4] = float("nan")
    other, _ = short_conv(poisoned, weight, None, borders, None)
    assert torch.equal(other[4:], output[4:])


def test_tokens_in_no_segment_read_0_and_touch_nothing() -> None:
    x = torch.randn(6, 2)
    x[4:] = float("nan")
    x.requires_grad_()
    weight = torch.randn(2, 3, requires_grad=True)
    output, state = short_conv(x, weight, None, torch.tensor([0, 1, 4]), None)
    assert not output[4:].any() and not state.isnan().any()
    gradients = torch.autograd.grad(output.sum() + state.sum(), (x, weight))
    assert not any(gradient.isnan().any() for gradient in gradients)


def test_the_output_has_the_inputs_dtype_and_the_state_its_own() -> None:
    output, state = short_conv(
        torch.randn(4, 2, dtype=torch.bfloat16), torch.randn(2, 3), None, torch.tensor([0, 4]), torch.zeros(1, 3, 2)
    )
    assert (output.dtype, state.dtype) == (torch.bfloat16, torch.float32)
