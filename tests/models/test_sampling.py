"""Draws: from the tokens that are allowed, as often as the model says."""

from __future__ import annotations

import pytest
import torch

from linear_moe.models import Sampling

ODDS = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


def drawn(sampling: Sampling, odds: torch.Tensor = ODDS, count: int = 20_000) -> torch.Tensor:
    logits = odds.log().expand(count, -1)
    return sampling.draw(logits, torch.Generator().manual_seed(0)).bincount(minlength=odds.numel()) / count


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(1.0), [0, 1, 2, 3, 4]),
        (Sampling(1.0, top_k=2), [1, 3]),
        (Sampling(1.0, top_k=99), [0, 1, 2, 3, 4]),
        # 0.4, 0.7, 0.85: the third token is the one that reaches 0.75.
        (Sampling(1.0, top_p=0.75), [1, 3, 4]),
        (Sampling(1.0, top_p=0.69), [1, 3]),
        (Sampling(1.0, top_p=1e-9), [1]),
        (Sampling(1.0, top_p=1.0), [0, 1, 2, 3, 4]),
        # Of the two that top_k leaves the first has 4 / 7 of what is left.
        (Sampling(1.0, top_k=2, top_p=0.5), [1]),
        (Sampling(1.0, top_k=2, top_p=0.6), [1, 3]),
    ],
)
def test_draws_follow_the_odds_of_what_is_allowed(sampling: Sampling, allowed: list[int]) -> None:
    wanted = torch.zeros(5).scatter(0, torch.tensor(allowed), ODDS[allowed])
    frequencies = drawn(sampling)
    assert frequencies.nonzero().flatten().tolist() == allowed
    # Five standard deviations of a frequency of 20,000 draws.
    assert torch.allclose(frequencies, wanted / wanted.sum(), atol=5 * 0.5 / 20_000**0.5)


def test_temperature_sharpens_and_none_takes_the_likeliest() -> None:
    squared = ODDS**2 / (ODDS**2).sum()
    assert torch.allclose(drawn(Sampling(0.5)), squared, atol=0.018)
    assert drawn(Sampling())[1] == 1


def test_ties_let_no_further_token_in() -> None:
    even = torch.full((5,), 0.2)
    assert int((drawn(Sampling(1.0, top_k=2), even) > 0).sum()) == 2
    assert int((drawn(Sampling(1.0, top_p=0.35), even) > 0).sum()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0, got -1"),
        ({"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"top_k": 3}, "top_k = 3 would be ignored at temperature 0"),
        ({"top_p": 0.5}, "top_p = 0.5 would be ignored at temperature 0"),
    ],
)
def test_bad_options_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)  # type: ignore[arg-type]
