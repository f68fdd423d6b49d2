"""A user's mistake is one message, not a traceback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import typer
from rich.console import Console

from linear_moe.training.extras import MissingExtraError
from linear_moe.training.loop import DivergedError

INTERRUPTED = 130
"""Of shells: 128 and the number of SIGINT."""

_P = ParamSpec("_P")
_tracebacks = False


def show_tracebacks(wanted: bool) -> None:
    """Whether errors are raised as they are."""
    global _tracebacks
    _tracebacks = wanted


def explained(command: Callable[_P, None]) -> Callable[_P, None]:
    """`command`, with the errors that a user can cause or mend told in a line on stderr, and an exit code."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:
            # `| head`: nobody is left to be told.
            raise
        except (ValueError, OSError, MissingExtraError, DivergedError) as error:
            if _tracebacks:
                raise
            tell(str(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            if _tracebacks:
                raise
            tell("interrupted")
            raise typer.Exit(INTERRUPTED) from None

    return run


def tell(message: str) -> None:
    """An error on stderr. Not marked up: brackets in a message are the user's."""
    console = Console(stderr=True, soft_wrap=True)
    console.print("error:", style="bold red", end=" ")
    console.print(message, markup=False, highlight=False)
