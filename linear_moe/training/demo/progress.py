"""How far the study is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 20.0


class StudyDisplay:
    """Phases one after another, each with its own bar or lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._phase = ""
        self._shown = 0.0
        self._done = 0
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console)

    def __enter__(self) -> StudyDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, phase: str, done: int, total: int) -> None:
        """Steps done of all steps of a phase."""
        new, self._phase = phase != self._phase, phase
        if self._bar is not None:
            if new:
                self._task = self._bar.add_task(phase, total=total)
            assert self._task is not None
            self._bar.update(self._task, completed=done)
        elif new or (done == total != self._done) or time.perf_counter() - self._shown > LINE_EVERY_S:
            self._shown = time.perf_counter()
            self._console.print(f"{phase}: {done:,} of {total:,} steps")
        self._done = done
