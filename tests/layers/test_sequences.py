from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linear_moe.layers.sequences import describe_sequences


@given(st.integers(1, 3), st.integers(0, 6), st.data())
def test_a_padding_mask_is_described_token_by_token(batch: int, length: int, data: st.DataObject) -> None:
    rows = data.draw(
        st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch)
    )
    mask = torch.tensor(rows, dtype=torch.bool).reshape(batch, length)
    described = describe_sequences(torch.zeros(batch, length, 2), mask)
    expected_index, expected_position = [], []
    for b, row in enumerate(rows):
        for t, real in enumerate(row):
            expected_index.append(b if real else batch)
            expected_position.append(sum(row[:t]))
    assert described.num_sequences == batch
    assert described.valid.tolist() == [real for row in rows for real in row]
    assert described.index.tolist() == expected_index
    real_positions = described.position[described.valid].tolist()
    assert real_positions == [p for p, i in zip(expected_position, expected_index, strict=True) if i < batch]
    assert bool((described.position >= 0).all())
    assert described.lengths.tolist() == [sum(row) for row in rows]
    assert int(described.lengths.max()) <= described.max_length


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.sampled_from([torch.int32, torch.int64]))
def test_packed_documents_are_described_token_by_token(lengths: list[int], dtype: torch.dtype) -> None:
    borders = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    described = describe_sequences(torch.zeros(1, sum(lengths), 2), None, borders)
    assert described.num_sequences == len(lengths)
    assert described.index.tolist() == [n for n, length in enumerate(lengths) for _ in range(length)]
    assert described.position.tolist() == [t for length in lengths for t in range(length)]
    assert described.lengths.tolist() == lengths
    assert bool(described.valid.all())
    assert described.max_length == sum(lengths)
    longest = max(1, *lengths)
    for bound in (longest, longest + 1, sum(lengths) + 1):
        bounded = describe_sequences(torch.zeros(1, sum(lengths), 2), None, borders, bound)
        assert bounded.max_length == min(bound, sum(lengths))
    if longest > 1:
        with pytest.raises(ValueError, match=f"max_length must bound every.*got {longest - 1} and one of {longest}"):
            describe_sequences(torch.zeros(1, sum(lengths), 2), None, borders, longest - 1)


def test_without_either_every_row_is_a_sequence() -> None:
    described = describe_sequences(torch.zeros(2, 3, 4))
    assert described.index.tolist() == [0, 0, 0, 1, 1, 1]
    assert described.position.tolist() == [0, 1, 2, 0, 1, 2]
    assert described.lengths.tolist() == [3, 3]


@pytest.mark.parametrize(
    "shape, mask, borders, message",
    [
        ((4, 3), None, None, r"x must be \[B, T, D\], got shape \(4, 3\)"),
        (
            (1, 4, 3),
            torch.ones(1, 4, dtype=torch.bool),
            torch.tensor([0, 4]),
            "padding_mask and cu_seqlens were both given",
        ),
        ((2, 4, 3), torch.ones(2, 4), None, r"padding_mask must be bool of shape \[2, 4\].*got torch.float32"),
        ((2, 4, 3), torch.ones(2, 5, dtype=torch.bool), None, r"padding_mask must be bool of shape \[2, 4\].*\[2, 5\]"),
        ((1, 2, 3), [[True, True]], None, r"padding_mask must be bool of shape \[1, 2\].*got a list, not a tensor"),
        ((1, 4, 3), None, [0, 4], r"cu_seqlens must be an int32 or int64 tensor \[N \+ 1\], got a list"),
        ((2, 4, 3), None, torch.tensor([0, 4]), r"packed input \(cu_seqlens\) must have B = 1, got B = 2"),
        ((1, 4, 3), None, torch.tensor([0.0, 4.0]), "cu_seqlens must be int32 or int64.*got torch.float32"),
        ((1, 4, 3), None, torch.tensor([0]), r"cu_seqlens must be int32 or int64 of shape \[N \+ 1\] with N >= 1"),
        ((1, 4, 3), None, torch.tensor([1, 4]), "cu_seqlens must start at 0, got 1"),
        ((1, 4, 3), None, torch.tensor([0, 3, 2, 4]), r"cu_seqlens must not fall, got cu_seqlens\[1\] = 3"),
        ((1, 4, 3), None, torch.tensor([0, 3]), "cu_seqlens must end at T = 4, got 3"),
    ],
)
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], mask: Any, borders: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe_sequences(torch.zeros(*shape), mask, borders)


@pytest.mark.parametrize(
    "borders, bound, message",
    [
        (None, 3, "it goes with cu_seqlens, which was not given"),
        (torch.tensor([0, 4]), 0, "max_length must be at least 1, or None for T, got 0"),
        (torch.tensor([0, 1, 4]), 2, "max_length must bound every packed sequence, got 2 and one of 3 tokens"),
    ],
)
def test_a_bound_that_does_not_fit_is_refused(borders: Any, bound: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe_sequences(torch.zeros(1, 4, 3), None, borders, bound)
