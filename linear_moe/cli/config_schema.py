"""`linear-moe config-schema`"""

from __future__ import annotations

import json

import typer

from linear_moe.models.json_schema import json_schema


def config_schema() -> None:
    """Print the JSON schema of model configurations, for editors.

    Example: linear-moe config-schema > schema.json
    """
    typer.echo(json.dumps(json_schema(), indent=2))
