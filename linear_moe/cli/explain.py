"""`linear-moe explain`"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from linear_moe.cli.console import make_console
from linear_moe.models.explain import DEFAULT_CONTEXT
from linear_moe.models.explain import explain as explain_model
from linear_moe.models.library import load_config, shipped_configs

CONFIG_HELP = "A YAML file, or a shipped model: " + ", ".join(shipped_configs()) + "."


def explain(
    config: Annotated[str, typer.Argument(help=CONFIG_HELP)],
    context: Annotated[int, typer.Option(help="Tokens of a sequence, for the cost of attention.")] = DEFAULT_CONTEXT,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print what a model is made of: its layers, parameters, state and FLOPs. Nothing is allocated.

    Example: linear-moe explain mom-380m
    """
    explanation = explain_model(load_config(config), context=context)
    if as_json:
        typer.echo(json.dumps(explanation.as_dict(), indent=2))
    else:
        make_console().print(explanation)
