"""How far the study is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from linear_moe.training.demo.progress import StudyDisplay


@pytest.mark.parametrize("terminal", [False, True])
def test_every_phase_is_shown_once_begun_and_once_done(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with StudyDisplay(console) as display:
        for phase in ("tuning", "study"):
            for done in (0, 5, 10, 10, 10):
                display.update(phase, done, 10)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    if terminal:
        assert "tuning" in text
        assert "100%" in text
    else:
        assert text.splitlines() == [
            f"{phase}: {done} of 10 steps" for phase in ("tuning", "study") for done in (0, 10)
        ]
