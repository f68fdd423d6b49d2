"""Showing how a run goes: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from linear_moe.training.loop import StepReport
from linear_moe.training.throughput import Speed

LINE_EVERY_S = 10.0
"""Between two plain lines."""

Details = Callable[[float], str]
"""What else to show beside a speed in tokens a second; asked for as seldom as it is shown."""


class Display(Protocol):
    """What a run reports its steps to."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def update(self, report: StepReport) -> None:
        """A step has been done."""

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None:
        """Held-out data has been scored on the way."""


def make_display(console: Console, *, steps: int, start: int = 0, details: Details | None = None) -> Display:
    """A bar where it can be drawn, lines elsewhere."""
    details = details or (lambda speed: "")
    return BarDisplay(console, steps, start, details) if console.is_terminal else LineDisplay(console, steps, details)


class BarDisplay:
    """A bar with loss, speed, whatever else is to be shown, and the time that is left."""

    def __init__(self, console: Console, steps: int, start: int, details: Details) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TextColumn("{task.fields[details]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID = self._progress.add_task(
            "", total=steps, completed=start, loss=float("nan"), speed=0.0, details=""
        )
        self._details = details
        self._speed = Speed()
        self._shown = 0.0

    def __enter__(self) -> BarDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, report: StepReport) -> None:
        """Move the bar; the speed is that of the last second."""
        self._speed.add(report.tokens)
        now = time.perf_counter()
        if now - self._shown > 1:
            self._shown = now
            speed = self._speed.restart()
            self._progress.update(self._task, speed=speed, details=self._details(speed))
        self._progress.update(self._task, completed=report.step, loss=report.loss)

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None:
        """A line above the bar."""
        self._progress.console.print(scores_line(step, scores), highlight=False)


class LineDisplay:
    """A line for the first and the last step, and every ten seconds between."""

    def __init__(self, console: Console, steps: int, details: Details) -> None:
        self._console = console
        self._steps = steps
        self._details = details
        self._speed = Speed()
        self._shown = -LINE_EVERY_S

    def __enter__(self) -> LineDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def update(self, report: StepReport) -> None:
        """A line, if it is time for one."""
        self._speed.add(report.tokens)
        now = time.perf_counter()
        if now - self._shown < LINE_EVERY_S and report.step != self._steps:
            return
        self._shown = now
        speed = self._speed.restart()
        details = self._details(speed)
        self._console.print(
            f"step {report.step}/{self._steps}  loss {report.loss:.3f}  {speed:,.0f} tokens/s{details and '  '}{details}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None:
        """A line."""
        self._console.print(scores_line(step, scores), highlight=False, soft_wrap=True)


def scores_line(step: int, scores: Mapping[str, float]) -> str:
    """The scores of a step in words."""
    parts = (f"{name.replace('_', ' ')} {value:.4f}" for name, value in scores.items())
    return f"step {step}  held out: {', '.join(parts)}"
