"""How large the demo is on a CPU, on a GPU, and for a quick look."""

from __future__ import annotations

from typing import NamedTuple

from linear_moe.data.mqar import MQAR
from linear_moe.models.library import load_config
from linear_moe.models.schema import ModelConfig
from linear_moe.training.demo.recall_study import StudySize
from linear_moe.training.demo.text_part import TextSize
from linear_moe.training.settings import TrainSettings

DESIGNS = {"one memory": "recall-single", "one, widened": "recall-wide", "mixture": "recall-mom"}


class DemoSize(NamedTuple):
    """Both halves."""

    study: StudySize
    text: TextSize


def demo_size(name: str) -> DemoSize:
    """The size of a name: "quick" (under a minute, too short for a comparison), "cpu" or "gpu".

    Raises:
        ValueError: for another name.
    """
    if name not in SIZES:
        raise ValueError(f"size must be one of auto, {', '.join(SIZES)}, got {name!r}")
    return SIZES[name]()


def _quick() -> DemoSize:
    study = StudySize(
        MQAR(vocab_size=64, length=32, num_pairs=8),
        (),
        _designs(),
        TrainSettings(steps=30, schedule="one-cycle", weight_decay=0.1),
        learning_rates=(1e-2,),
        num_seeds=2,
        batch_size=8,
        held_out_size=64,
    )
    return DemoSize(study, TextSize(steps=3, batch_size=4, context=64, held_out_bytes=1000, excerpt_bytes=160))


def _cpu() -> DemoSize:
    # Measured, seconds of one core a run: mixture 39, widened 19, one 17; 7 runs each, so 4.5 minutes on two cores.
    # Without practice the widened memory ended 1800 steps at 0.35, 0.97, 0.38, 0.97 on four seeds, by whether it had begun to
    # learn; with it the two late seeds end at 0.92 and 0.95. In runs of 3000 steps the last quarter added 0.02 to one memory
    # and nothing to the mixture. At 20 pairs the same number of steps is too few.
    study = StudySize(
        MQAR(vocab_size=64, length=64, num_pairs=14),
        (MQAR(vocab_size=64, length=24, num_pairs=4),),
        _designs(),
        TrainSettings(steps=2000, schedule="one-cycle", weight_decay=0.1),
        learning_rates=(5e-3, 1e-2, 2e-2),
        num_seeds=4,
        batch_size=16,
    )
    return DemoSize(study, TextSize(steps=180, batch_size=4, accumulate=2, context=256))


def _gpu() -> DemoSize:
    study = StudySize(
        MQAR(vocab_size=64, length=80, num_pairs=20),
        (MQAR(vocab_size=64, length=24, num_pairs=4), MQAR(vocab_size=64, length=48, num_pairs=10)),
        _designs(),
        TrainSettings(steps=3000, schedule="one-cycle", weight_decay=0.1),
        learning_rates=(5e-3, 1e-2, 2e-2),
        num_seeds=6,
        batch_size=64,
    )
    return DemoSize(study, TextSize(steps=1000, batch_size=16, accumulate=4, context=512))


def _designs() -> dict[str, ModelConfig]:
    return {label: load_config(name) for label, name in DESIGNS.items()}


SIZES = {"quick": _quick, "cpu": _cpu, "gpu": _gpu}
