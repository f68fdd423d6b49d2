"""How a model is trained: everything but the model and the data."""

from __future__ import annotations

from dataclasses import dataclass

SCHEDULES = ("cosine", "wsd", "one-cycle", "constant")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one run.

    Args:
        steps: optimiser steps.
        learning_rate: the schedule's peak.
        schedule: "cosine": linear warm-up, then a half cosine down to a tenth; "wsd": linear warm-up, the peak, and a linear
            way down to 0 in the last `decay` of the steps (2405.18392); "one-cycle": half cosines up from 1/25 and down to 0;
            "constant": linear warm-up, then the peak.
        warmup: fraction of the steps before the peak; None for 0.05, and 0.3 for one-cycle.
        decay: of "wsd": fraction of the steps on the way down.
        weight_decay: on matrices only; A_log, dt_bias, norms and biases are left out: see `parameter_groups`.
        betas: of AdamW.
        gradient_clip: largest norm of all gradients together.
        accumulate: batches a step.
        seed: of the initialisation (by whoever builds the model) and of the order of the data.
        precision: "float32", or "bfloat16" by autocast: parameters, optimiser, gates and memories stay float32.
        deterministic: on a GPU, take only algorithms that give the same bits each time; on a CPU all do.
        capture: on one GPU, replay forward and backward from CUDA graphs: see `linear_moe.training.captured`.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    steps: int = 1000
    learning_rate: float = 3e-3
    schedule: str = "cosine"
    warmup: float | None = None
    decay: float = 0.2
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    accumulate: int = 1
    seed: int = 0
    precision: str = "float32"
    deterministic: bool = False
    capture: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.warmup is not None and not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a fraction of the steps and must be in [0, 1), got {self.warmup}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay is a fraction of the steps and must be in (0, 1], got {self.decay}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        for name, allowed in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
