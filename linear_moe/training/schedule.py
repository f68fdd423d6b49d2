"""The learning rate of each step: a function of the step alone, so that a resumed run goes on where it was."""

from __future__ import annotations

import math

from linear_moe.training.settings import TrainSettings

COSINE_FLOOR = 0.1
"""Where "cosine" ends, as a fraction of the peak."""
CYCLE_START = 1 / 25
"""Where "one-cycle" starts, as a fraction of the peak."""


def learning_rate(step: int, settings: TrainSettings) -> float:
    """The learning rate of step `step`, from 0."""
    one_cycle = settings.schedule == "one-cycle"
    fraction = (0.3 if one_cycle else 0.05) if settings.warmup is None else settings.warmup
    warmup = round(settings.steps * fraction)
    if step < warmup:
        # The first step is no step of size 0.
        done = (step + 1) / (warmup + 1)
        factor = _half_cosine(CYCLE_START, 1.0, done) if one_cycle else done
    elif settings.schedule == "constant":
        factor = 1.0
    elif settings.schedule == "wsd":
        decay = max(round(settings.steps * settings.decay), 1)
        # Counted so that the last step is not one of size 0.
        factor = min((settings.steps - step) / (decay + 1), 1.0)
    else:
        done = (step - warmup) / max(settings.steps - warmup, 1)
        factor = _half_cosine(1.0, 0.0 if one_cycle else COSINE_FLOOR, done)
    return settings.learning_rate * factor


def _half_cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
