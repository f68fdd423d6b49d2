"""TensorBoard and trackio get the numbers that the metrics file gets."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from small_models import small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_run import Watcher

from linear_moe.models.extras import MissingExtraError
from linear_moe.training.logs import scalars
from linear_moe.training.metrics import read_metrics
from linear_moe.training.plan import RunPlan, TaskOptions
from linear_moe.training.run import Run, resume_run, start_run
from linear_moe.training.settings import TrainSettings


def _start(folder: Path, *logs: str) -> Run:
    options = TaskOptions(task="mqar", problems=("16:3",), batch_size=2)
    return start_run(small_config(), RunPlan(options, TrainSettings(steps=4), 1, 2, 2, logs), folder)


def _numbers(folder: Path) -> dict[int, dict[str, float]]:
    """By step, all of its lines together."""
    steps: dict[int, dict[str, float]] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        steps.setdefault(line.pop("step"), {}).update(scalars(line))
    return steps


def test_numbers_go_by_their_path() -> None:
    line = {"loss": 2.5, "n": 3, "none": None, "final": True, "held_out": {"a b": 1.0}, "text": "x"}
    routing = [{"layer": 4, "load": [0.25, 0.75], "entropy": 1.5}]
    assert scalars({**line, "routing": routing}) == {
        "loss": 2.5,
        "n": 3,
        "held_out/a b": 1.0,
        "routing/4/load/0": 0.25,
        "routing/4/load/1": 0.75,
        "routing/4/entropy": 1.5,
    }


def test_tensorboard_has_every_number_once_and_those_of_a_resumed_run_too(tmp_path: Path) -> None:
    _start(tmp_path, "tensorboard").train(Watcher(interrupt_at=3))
    resume_run(tmp_path).train(Watcher())
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    wanted = _numbers(tmp_path)
    assert sorted(events.Tags()["scalars"]) == sorted({name for values in wanted.values() for name in values})
    for name in events.Tags()["scalars"]:
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx({step: values[name] for step, values in wanted.items() if name in values})


def test_trackio_has_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a module of that name that writes down what it is called with: the real one brings a web server."""
    calls: list[Any] = []
    module = ModuleType("trackio")

    def init(project: str, name: str, config: dict[str, Any], resume: str) -> None:
        calls.append(("init", project, name, config["settings"]["steps"], resume))

    def log(metrics: Mapping[str, float], step: int) -> None:
        calls.append((step, dict(metrics)))

    module.init, module.log, module.finish = init, log, lambda: calls.append("finish")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)
    _start(tmp_path / "fox", "trackio").train(Watcher())
    assert calls[0] == ("init", "linear-moe", "fox", 4, "allow")
    assert calls[-1] == "finish"
    steps: dict[int, dict[str, float]] = {}
    for step, values in calls[1:-1]:
        steps.setdefault(step, {}).update(values)
    assert steps == _numbers(tmp_path / "fox")


def test_a_log_that_is_not_installed_or_unknown_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(MissingExtraError, match=r"trackio is needed .* pip install 'linear-moe\[trackio\]'"):
        _start(tmp_path / "run", "trackio")
    with pytest.raises(ValueError, match="log must be one of tensorboard, trackio, got 'paper'"):
        _start(tmp_path / "run", "paper")
    assert not (tmp_path / "run").exists()
