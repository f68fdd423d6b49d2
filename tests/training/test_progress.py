"""What is shown of a run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from linear_moe.training import progress
from linear_moe.training.loop import StepReport
from linear_moe.training.progress import BarDisplay, LineDisplay, make_display


def _shown(console: Console, steps: int = 3) -> str:
    with make_display(console, steps=steps, details=lambda speed: "MFU [1%]" if speed > 1 else "") as display:
        for step in range(1, steps + 1):
            display.update(StepReport(step, 2.5 / step, 1.0, 1e-3, 1000))
            if step == 2:
                display.evaluated(step, {"bits_per_byte": 1.5, "perplexity": 12.0})
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_lines_for_the_first_and_last_step() -> None:
    text = _shown(Console(file=io.StringIO(), width=100))
    first, scores, last = text.splitlines()
    assert scores == "step 2  held out: bits per byte 1.5000, perplexity 12.0000"
    assert first.startswith("step 1/3  loss 2.500  ")
    assert last.startswith("step 3/3  loss 0.833  ")
    assert first.endswith("tokens/s  MFU [1%]")


def test_plain_lines_between_when_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    assert len(_shown(Console(file=io.StringIO(), width=100)).splitlines()) == 4


def test_a_bar_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    assert isinstance(make_display(console, steps=3), BarDisplay)
    text = _shown(console)
    assert "3/3" in text
    assert "loss 0.833" in text
    assert "tokens/s" in text
    assert "held out: bits per byte" in text
    assert isinstance(make_display(Console(file=io.StringIO()), steps=1), LineDisplay)
