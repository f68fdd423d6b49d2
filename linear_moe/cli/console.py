"""The terminal that commands write to."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

PLAIN_WIDTH = 120
"""Of a table that goes to a file or a pipe, where there is no terminal to fit."""


def make_console() -> Console:
    """Standard output: as wide as the terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(console.width, PLAIN_WIDTH))


def make_progress() -> Progress:
    """Bars on standard error, gone when done: standard output is for what was asked for."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
