"""The commands gathered."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from linear_moe.cli import errors
from linear_moe.cli.config_schema import config_schema
from linear_moe.cli.convert import convert
from linear_moe.cli.demo import demo
from linear_moe.cli.doctor import doctor
from linear_moe.cli.eval import eval_
from linear_moe.cli.explain import explain
from linear_moe.cli.generate import generate
from linear_moe.cli.inspect import inspect
from linear_moe.cli.rules import rules
from linear_moe.cli.train import train
from linear_moe.cli.tune import tune

app = typer.Typer(
    name="linear-moe",
    help="Recurrent memory for sequence models: declared linear recurrences, and mixtures of their memories.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (rules, explain, train, generate, eval_, inspect, convert, demo, doctor, tune, config_schema):
    app.command(name=command.__name__.rstrip("_").replace("_", "-"))(errors.explained(command))


def _version(wanted: bool) -> None:
    if wanted:
        import linear_moe

        typer.echo(linear_moe.__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="LINEAR_MOE_DEBUG", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    errors.show_tracebacks(debug)


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A pipe on Windows may not have every character.
            stream.reconfigure(errors="replace")
    app()
