"""Showing how a run goes: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from linear_moe.training.loop import StepReport

LINE_EVERY_S = 10.0
"""Between two plain lines."""


class Speed:
    """Tokens a second since the last time it was asked."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._tokens = 0

    def add(self, tokens: int) -> None:
        """Count tokens."""
        self._tokens += tokens

    def restart(self) -> float:
        """The speed since the last restart."""
        now = time.perf_counter()
        speed = self._tokens / max(now - self._since, 1e-9)
        self._since, self._tokens = now, 0
        return speed


class Display(Protocol):
    """What a run reports its steps to."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def update(self, report: StepReport) -> None:
        """A step has been done."""


def make_display(console: Console, *, steps: int, start: int = 0) -> Display:
    """A bar where it can be drawn, lines elsewhere."""
    return BarDisplay(console, steps, start) if console.is_terminal else LineDisplay(console, steps)


class BarDisplay:
    """A bar with loss, speed and the time that is left."""

    def __init__(self, console: Console, steps: int, start: int) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID = self._progress.add_task("", total=steps, completed=start, loss=float("nan"), speed=0.0)
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
            self._progress.update(self._task, speed=self._speed.restart())
        self._progress.update(self._task, completed=report.step, loss=report.loss)


class LineDisplay:
    """A line for the first and the last step, and every ten seconds between."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._steps = steps
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
        self._console.print(
            f"step {report.step}/{self._steps}  loss {report.loss:.3f}  {self._speed.restart():,.0f} tokens/s",
            highlight=False,
        )
