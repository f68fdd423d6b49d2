"""The learning rate over the steps."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linear_moe.training.schedule import learning_rate
from linear_moe.training.settings import SCHEDULES, TrainSettings


@given(st.sampled_from(SCHEDULES), st.integers(1, 60), st.none() | st.floats(0, 0.99))
def test_it_rises_to_the_peak_and_does_not_rise_again(schedule: str, steps: int, warmup: float | None) -> None:
    settings = TrainSettings(steps=steps, learning_rate=2.0, schedule=schedule, warmup=warmup)
    rates = [learning_rate(step, settings) for step in range(steps)]
    top = rates.index(max(rates))
    assert all(0 < rate <= 2.0 for rate in rates)
    assert all(a < b for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(a >= b for a, b in itertools.pairwise(rates[top:]))


def test_where_it_starts_and_ends() -> None:
    cosine = TrainSettings(steps=1000, learning_rate=1.0, warmup=0.1)
    assert learning_rate(0, cosine) == pytest.approx(1 / 101)
    assert learning_rate(100, cosine) == 1.0
    assert learning_rate(1000, cosine) == pytest.approx(0.1)
    cycle = TrainSettings(steps=1000, learning_rate=1.0, schedule="one-cycle")
    assert learning_rate(300, cycle) == 1.0
    assert learning_rate(0, cycle) == pytest.approx(1 / 25, abs=1e-3)
    assert learning_rate(1000, cycle) == pytest.approx(0.0)
    assert learning_rate(999, TrainSettings(steps=1000, learning_rate=1.0, schedule="constant")) == 1.0
    wsd = TrainSettings(steps=1000, learning_rate=1.0, schedule="wsd", warmup=0.1, decay=0.3)
    assert learning_rate(0, wsd) == pytest.approx(1 / 101)
    assert [learning_rate(step, wsd) for step in (100, 400, 699)] == [1.0] * 3
    assert learning_rate(849, wsd) == pytest.approx(0.5, abs=4e-3)
    assert learning_rate(999, wsd) == pytest.approx(1 / 301)
