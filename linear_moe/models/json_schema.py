"""The JSON schema of configuration files, for editors.

It is shipped in `configs/schema.json`; `write_json_schema()` writes it there after a change, and a test says when it is due.
"""

from __future__ import annotations

import json
from typing import Any

from linear_moe.models.library import CONFIG_FOLDER
from linear_moe.models.schema import ModelConfig

SCHEMA_FILE = CONFIG_FOLDER / "schema.json"


def json_schema() -> dict[str, Any]:
    """The schema of `ModelConfig`. The options of the built-in rules are in it, those of other rules can't be."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **ModelConfig.model_json_schema(),
        "title": "linear_moe model",
    }


def schema_text() -> str:
    """The shipped file's contents."""
    return json.dumps(json_schema(), indent=2) + "\n"


def write_json_schema() -> None:
    """Write the shipped file."""
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
