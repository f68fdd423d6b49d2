"""A user's mistake is one message, not a traceback."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec

import typer
from rich.console import Console

from linear_moe.models.extras import MissingExtraError
from linear_moe.training.checkpoint import DamagedCheckpointWarning
from linear_moe.training.divergence import DivergedError

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
            with _damage_in_words():
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


@contextlib.contextmanager
def _damage_in_words() -> Iterator[None]:
    """A damaged checkpoint that another stood in for is told in a line too; other warnings are left as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", DamagedCheckpointWarning)
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, DamagedCheckpointWarning):
                tell(str(message), kind="note")
            else:
                shown(message, category, *where, **more)

        warnings.showwarning = show
        yield


def tell(message: str, *, kind: str = "error") -> None:
    """An error or a note on stderr. Not marked up: brackets in a message are the user's."""
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"{kind}:", style="bold red" if kind == "error" else "bold yellow", end=" ")
    console.print(message, markup=False, highlight=False)
