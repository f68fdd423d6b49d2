"""What the kernels share, each part by itself."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from cases import DEVICE
from torch import Tensor

from linear_moe.kernels.blocks import Direction, gates_by_head, sum_rows, zero_uncovered
from linear_moe.kernels.decay_gradient import decay_gradient
from linear_moe.kernels.delta_walks import unit_lower_inverse
from linear_moe.kernels.join import FROM_ZEROS, Starts
from linear_moe.kernels.splits import cut, whole
from linear_moe.testing.budget import assert_within_budget


def borders_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)


@triton.jit
def _inverse_kernel(
    lower_ptr, weights_ptr, inverse_ptr, SIZE: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr
):
    rows = tl.arange(0, SIZE)
    at = rows[:, None] * SIZE + rows[None, :]
    inverse = unit_lower_inverse(tl.load(lower_ptr + at), tl.load(weights_ptr + rows), SIZE, LEVELS, PRECISION)
    tl.store(inverse_ptr + at, inverse)


def overlaps(size: int, apart: float) -> Tensor:
    """<k_t, k_j> of keys that are `apart`."""
    k = F.normalize(torch.randn(16) + apart * torch.randn(size, 16), dim=-1)
    return k @ k.T


LOWERS = {
    "nothing": lambda size: (torch.zeros(size, size), 1.0),
    "keys of no pattern, written at strengths up to 2": lambda size: (overlaps(size, 100.0), 2 * torch.rand(size)),
    "keys nearly parallel": lambda size: (overlaps(size, 0.01), 1.0),
    "keys nearly parallel, some written at half": lambda size: (
        overlaps(size, 0.01),
        torch.rand(size).round() / 2 + 0.5,
    ),
    "one key": lambda size: (torch.ones(size, size), 1.0),
    "one key, reflected": lambda size: (torch.ones(size, size), 2.0),
    "keys nearly parallel, reflected": lambda size: (overlaps(size, 0.01), 2.0),
}


def drawn(kind: str, size: int) -> tuple[Tensor, Tensor]:
    """A strictly lower triangle and its rows' weights."""
    lower, weights = LOWERS[kind](size)
    return lower.tril(-1).to(DEVICE), (weights * torch.ones(size)).to(DEVICE)


def inverse_of(lower: Tensor, weights: Tensor, precision: str) -> Tensor:
    inverse = torch.full_like(lower, torch.nan)
    levels = len(lower).bit_length() - 1
    _inverse_kernel[(1,)](lower, weights, inverse, SIZE=len(lower), LEVELS=levels, PRECISION=precision)
    return inverse


def solved(lower: Tensor, weights: Tensor) -> Tensor:
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(identity + weights[:, None] * lower, identity, upper=False, unitriangular=True)


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("kind", LOWERS)
def test_the_inverse_of_a_unit_lower_triangle(kind: str, size: int) -> None:
    lower, weights = drawn(kind, size)
    inverse, exact = inverse_of(lower, weights, "ieee"), solved(lower.double(), weights.double())
    assert_within_budget({"inverse": inverse}, {"inverse": solved(lower, weights)}, {"inverse": exact})


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("kind", LOWERS)
def test_the_inverse_by_blocks_is_the_same(kind: str, size: int) -> None:
    """In less than float32 on a GPU, which multiplies the errors of keys that are nearly parallel."""
    lower, weights = drawn(kind, size)
    exact = solved(lower.double(), weights.double())
    error = (inverse_of(lower, weights, "tf32") - exact).abs().max() / exact.abs().max()
    assert error < (1e-4 if DEVICE == "cpu" else 0.1)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("heads", [1, 3, 20])
def test_decays_are_summed_along_every_chunk(heads: int, exact: bool) -> None:
    lengths, spare, chunk = [37, 0, 16, 1], 5, 16
    log_decay = -torch.rand(sum(lengths) + spare, heads).to(DEVICE)
    borders = borders_of(lengths)
    chunks = cut(borders, len(log_decay), chunk, max(lengths)).borders
    sums = gates_by_head(log_decay, None, chunks, chunk, exact=exact).sums
    assert sums is not None
    assert sums.dtype == (torch.float64 if exact else torch.float32)

    def expected(x: Tensor) -> Tensor:
        parts = [
            part.cumsum(0)
            for segment in (x / math.log(2)).split([*lengths, spare])[:-1]
            for part in segment.split(chunk)
        ]
        return torch.cat(parts).T

    assert_within_budget(
        {"sums": sums[:, : sum(lengths)]}, {"sums": expected(log_decay)}, {"sums": expected(log_decay.double())}
    )
    beta, pieces = torch.rand_like(log_decay), cut(borders, len(log_decay), 2 * chunk, max(lengths)).borders
    made = gates_by_head(log_decay, beta, pieces, 2 * chunk, chunk=chunk, exact=exact)
    assert made.inner is not None and made.beta is not None
    assert_within_budget(
        {"inner": made.inner[:, : sum(lengths)]},
        {"inner": expected(log_decay)},
        {"inner": expected(log_decay.double())},
    )
    assert torch.equal(made.beta[:, : sum(lengths)], beta[: sum(lengths)].T)


@pytest.mark.parametrize("direction", ["forwards", "backwards"])
def test_factors_of_tokens_make_the_decay_of_every_pair_of_a_chunk(direction: Direction) -> None:
    """What one writes, read by another, has faded by what lies between them. The strongest are finite."""
    lengths, spare, chunk = [37, 0, 16, 1], 5, 16
    log_decay = -torch.rand(sum(lengths) + spare, 2).to(DEVICE)
    log_decay[20] = -500.0
    pieces = cut(borders_of(lengths), len(log_decay), 2 * chunk, max(lengths)).borders
    factors = gates_by_head(log_decay, None, pieces, 2 * chunk, chunk=chunk, exact=False, factors=direction).factors
    assert factors is not None
    factors = factors[:, : sum(lengths)]
    assert factors.isfinite().all()
    for begin, end in [(0, 16), (32, 37), (37, 53), (53, 54)]:
        summed = log_decay[begin:end].double().cumsum(0).T
        away = summed if direction == "backwards" else summed[:, -1:] - summed
        writes, reads = factors[:, begin:end].double().unbind(-1)
        assert torch.allclose(writes, away.exp(), rtol=1e-5)
        between = away[:, :, None] - away[:, None, :]
        assert torch.allclose(writes[:, :, None] * reads[:, None, :], between.exp(), rtol=1e-5)


@pytest.mark.parametrize("shape", [(1,), (3, 2), (5, 120)])
@pytest.mark.parametrize("lengths", [[0], [3, 64, 1], [0, 70, 60], [63, 1, 64, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_past_the_last_border_become_0(dtype: torch.dtype, lengths: list[int], shape: tuple[int, ...]) -> None:
    covered = sum(lengths)
    for spare in (0, 1, 65):
        # A row more than the tensor has: nothing past it is written.
        memory = torch.randn(covered + spare + 1, *shape).to(DEVICE, dtype)
        expected = memory.clone()
        expected[covered:-1] = 0
        zero_uncovered(memory[:-1], borders_of(lengths))
        assert torch.equal(memory, expected)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 512), (65, 7, 80), (513, 2, 300), (1500, 33), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_summed(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(DEVICE)
    made = sum_rows(x, dtype)
    assert made.dtype == dtype and torch.equal(made, sum_rows(x, dtype))
    exact = x.double().sum(0)
    assert_within_budget(
        {"sum": made}, {"sum": exact.to(dtype)}, {"sum": exact}, terms={"sum": x.double().abs().sum(0)}
    )


def test_nothing_to_set_to_0() -> None:
    empty = torch.empty(0, 3, device=DEVICE)
    assert zero_uncovered(empty, borders_of([0, 0])) is empty


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("tiles", [(1, 1), (3, 2)])
@pytest.mark.parametrize(("heads", "more"), [(1, 0), (2, 0), (6, 40)])
def test_the_decay_gradient_is_what_crosses_a_token(
    heads: int, more: int, tiles: tuple[int, int], started: bool
) -> None:
    """<S_0, dS_0>, plus what earlier tokens wrote for later ones less what they read, piece by piece."""
    lengths, spare = [1500, 0, 3, 1025] + more * [2], 4
    total, borders = sum(lengths) + spare, borders_of(lengths)
    read, written = (torch.randn(count, heads, total).to(DEVICE) for count in tiles)
    starts, ends = torch.randn(2, len(lengths), heads, 70, 66).to(DEVICE)
    start, end = (Starts(starts), ends) if started else (FROM_ZEROS, None)
    gradient = decay_gradient(read, written, start, end, whole(borders).borders, dense=False).t()
    change = (written.double().sum(0) - read.double().sum(0)).split([*lengths, spare], 1)
    at_start = started * (starts.double() * ends.double()).sum((2, 3))
    exact = torch.cat(
        [start[:, None] + part.cumsum(1) - part for start, part in zip(at_start, change[:-1], strict=True)]
        + [torch.zeros_like(change[-1])],
        1,
    )
    assert_within_budget({"gradient": gradient}, {"gradient": exact.float()}, {"gradient": exact})
    assert not gradient[:, sum(lengths) :].any()
