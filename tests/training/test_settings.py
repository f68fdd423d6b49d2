"""Settings that can't be are refused by name."""

from __future__ import annotations

import re

import pytest

from linear_moe.training.settings import TrainSettings


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0, got nan"),
        ({"gradient_clip": -1.0}, "gradient_clip must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"warmup": 1.0}, "warmup is a fraction of the steps and must be in [0, 1), got 1.0"),
        ({"betas": (0.9, 1.0)}, "betas must be in [0, 1)"),
        ({"schedule": "linear"}, "schedule must be one of cosine, wsd, one-cycle, constant, got 'linear'"),
        ({"precision": "fp8"}, "precision must be one of float32, bfloat16, got 'fp8'"),
    ],
)
def test_settings_that_can_not_be(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        TrainSettings(**arguments)  # type: ignore[arg-type]
