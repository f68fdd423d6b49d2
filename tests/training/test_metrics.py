"""The metrics file."""

from __future__ import annotations

import json
from pathlib import Path

from small_models import recall_task, small_model

from linear_moe.training.metrics import MetricsFile, loads_in_words, read_metrics, routing_summary
from linear_moe.training.tasks import evaluated


def test_lines_are_whole_objects_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write(1, loss=2.5, nested={"list": [1.0, float("nan")]})
        assert json.loads(path.read_text()) == {"step": 1, "loss": 2.5, "nested": {"list": [1.0, None]}}
        metrics.write(2, loss=float("inf"))
    assert read_metrics(path)[1] == {"step": 2, "loss": None}


def test_going_on_drops_what_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "cut sh')
    with MetricsFile(path, keep_to_step=2) as metrics:
        metrics.write(3, again=True)
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_routing_is_summed_up() -> None:
    model = small_model()
    assert routing_summary(model) == []
    assert loads_in_words(model) == ""
    evaluated(model, recall_task().batch(0))
    (layer,) = routing_summary(model)
    assert layer["layer"] == 0
    assert abs(sum(layer["load"]) - 1) < 1e-3
    words = loads_in_words(model)
    assert words.startswith("memory loads ")
    shares = [int(share.removesuffix("%")) for share in words.split()[2:]]
    assert shares == sorted(shares, reverse=True)
    assert shares == [round(100 * share) for share in sorted(layer["load"], reverse=True)]
