"""`linear-moe rules`"""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer
from rich.table import Table

from linear_moe.cli.console import make_console
from linear_moe.rules.base import UpdateRule
from linear_moe.rules.registry import get_rule, rule_names
from linear_moe.rules.scan import implementations

SLOW = "recurrent only: a token at a time, checkpointed in training; slow"


def rules(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """List the registered rules: what each declares, what runs it, its options. Plugins are included.

    Example: linear-moe rules
    """
    capabilities = [describe_rule(get_rule(name)) for name in rule_names()]
    if as_json:
        typer.echo(json.dumps(capabilities, indent=2))
        return
    table = Table(title="rules", title_justify="left")
    for column in ("rule", "decay", "erase", "runs as", "options"):
        table.add_column(column, overflow="fold")
    for rule in capabilities:
        options = "\n".join(f"{o['name']} = {o['default']}: {o['help']}" for o in rule["options"])
        table.add_row(rule["name"], rule["decay"], rule["erase"], rule["note"], options)
    console = make_console()
    console.print(table)
    console.print("decay and erase: the declared form (linear_moe.forms); runs as: best first, chosen by impl='auto'.")


def describe_rule(rule: type[UpdateRule]) -> dict[str, Any]:
    """A rule's row, from what it declares."""
    form = rule.form
    able = implementations(form)
    return {
        "name": rule.name,
        "summary": (rule.__doc__ or "").strip().partition("\n")[0],
        "decay": form.decay.value if form else "-",
        "erase": form.erase.value if form else "-",
        "implementations": list(able),
        "note": SLOW if form is None else ", ".join(able),
        "options": [
            {"name": field.name, "default": _plain(field.default), "help": field.metadata.get("help", "")}
            for field in dataclasses.fields(rule)
            if field.name != "dims"
        ],
    }


def _plain(value: Any) -> Any:
    if value is dataclasses.MISSING:
        return "required"
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
