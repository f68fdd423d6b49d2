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
    settings = TrainSettings(steps=30, schedule="one-cycle", weight_decay=0.1)
    study = StudySize(
        MQAR(vocab_size=64, length=32, num_pairs=8),
        _designs(),
        settings,
        learning_rates=(1e-2,),
        num_seeds=2,
        batch_size=8,
        held_out_size=64,
    )
    return DemoSize(study, TextSize(steps=3, batch_size=4, context=64, held_out_bytes=1000, excerpt_bytes=160))


def _cpu() -> DemoSize:
    settings = TrainSettings(steps=1500, schedule="one-cycle", weight_decay=0.1)
    study = StudySize(
        MQAR(vocab_size=64, length=32, num_pairs=8),
        _designs(),
        settings,
        learning_rates=(5e-3, 1e-2),
    )
    return DemoSize(study, TextSize(steps=150, batch_size=16, context=256))


def _gpu() -> DemoSize:
    settings = TrainSettings(steps=3000, schedule="one-cycle", weight_decay=0.1)
    study = StudySize(
        MQAR(vocab_size=256, length=128, num_pairs=32),
        _designs(hidden_size=128, vocab_size=256, head_dim=16),
        settings,
        learning_rates=(3e-3, 1e-2),
        num_seeds=5,
        batch_size=64,
    )
    return DemoSize(study, TextSize(steps=1000, batch_size=64, context=512))


def _designs(*, head_dim: int | None = None, **model: int) -> dict[str, ModelConfig]:
    """The shipped configurations, or the same at another size: the widened one keeps its factor."""
    designs = {}
    for label, name in DESIGNS.items():
        data = load_config(name).model_dump(mode="json", exclude_unset=True)
        if head_dim is not None:
            mixer = data["blocks"]["memory"]["mixer"]
            if "head_value_dim" in mixer:
                mixer["head_value_dim"] = mixer["head_value_dim"] * head_dim // mixer["head_dim"]
            mixer["head_dim"] = head_dim
        designs[label] = ModelConfig.from_dict(data | model, source=name)
    return designs


SIZES = {"quick": _quick, "cpu": _cpu, "gpu": _gpu}
