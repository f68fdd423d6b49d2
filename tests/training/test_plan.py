"""Plans are plain data, and tasks come of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from small_models import small_config

from linear_moe.training.plan import RunPlan, TaskOptions, build_task
from linear_moe.training.settings import TrainSettings
from linear_moe.training.tasks import RecallTask, TextTask


def test_a_plan_survives_being_plain_data() -> None:
    task = TaskOptions(task="mqar", problems=("16:2", "24:3"), patterns=("*.py",))
    plan = RunPlan(task, TrainSettings(steps=7, warmup=0.2, betas=(0.8, 0.9)), log_every=3)
    assert RunPlan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


def test_recall_problems_by_size_or_by_the_published_mix() -> None:
    options = TaskOptions(task="mqar", problems=("16:2", "24:3"))
    task = build_task(options, small_config(), seed=5)
    assert isinstance(task, RecallTask)
    assert [(p.length, p.num_pairs, p.vocab_size) for p in task.problems] == [(16, 2, 16), (24, 3, 16)]
    published = build_task(TaskOptions(task="mqar", problems=("zoology",)), small_config(vocab_size=8192), seed=0)
    assert isinstance(published, RecallTask)
    assert len(published.problems) == 5
    assert len(published.held_out_problems) == 7


def test_text_from_a_file_and_by_default_from_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello " * 100)
    options = TaskOptions(data=str(tmp_path / "a.txt"), context=8, batch_size=2)
    task = build_task(options, small_config(vocab_size=257), seed=0)
    assert isinstance(task, TextTask)
    assert task.batch(0).tokens.shape == (1, 16)
    default = build_task(TaskOptions(), small_config(vocab_size=257), seed=0)
    assert "standard library" in default.describe()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TaskOptions(task="chess"), "task must be one of mqar, text, got 'chess'"),
        (lambda: TaskOptions(batch_size=0), "batch_size must be at least 1"),
        (lambda: RunPlan(log_every=0), "log_every must be at least 1"),
        (lambda: RunPlan(checkpoint_every=-1), "checkpoint_every must be at least 0"),
        (
            lambda: build_task(TaskOptions(task="mqar", problems=("16",)), small_config(), 0),
            "LENGTH:PAIRS such as 64:14, or zoology alone; got '16'",
        ),
        (lambda: build_task(TaskOptions(task="mqar", problems=("16:9",)), small_config(), 0), "length must be even"),
        (lambda: build_task(TaskOptions(), small_config(), 0), "vocab_size of small must be 257"),
    ],
)
def test_plans_that_can_not_be(make: object, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        make()  # type: ignore[operator]
