"""The schema for editors: shipped as generated, and of one mind with the reader."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import yaml

from linear_moe.models import json_schema, shipped_configs
from linear_moe.models.json_schema import SCHEMA_FILE, schema_text
from linear_moe.models.library import CONFIG_FOLDER


def mom(**options: Any) -> dict[str, Any]:
    block = {"mixer": {"type": "mom", **options}, "ffn": {"type": "none"}}
    return {"hidden_size": 8, "vocab_size": 4, "blocks": {"a": block}, "layers": "a"}


def test_the_shipped_file_is_current() -> None:
    message = "run: python -c 'from linear_moe.models.json_schema import *; write_json_schema()'"
    assert SCHEMA_FILE.read_text(encoding="utf-8") == schema_text(), message


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configurations_fit(name: str) -> None:
    data = yaml.safe_load((CONFIG_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(data, json_schema())


@pytest.mark.parametrize("rule", ["gla", {"type": "gla", "gate_rank": 8}, "a_users", {"type": "a_users", "depth": 2}])
def test_rules_fit(rule: Any) -> None:
    jsonschema.validate(mom(rule=rule), json_schema())


@pytest.mark.parametrize(
    "options", [{"topk": 2}, {"top_k": "2"}, {"rule": {"type": "gla", "gate_rang": 8}}, {"rule": 3}]
)
def test_what_the_reader_refuses_an_editor_marks(options: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(mom(**options), json_schema())


def test_every_option_is_described() -> None:
    schema = json.loads(schema_text())
    for name, part in [("model", schema), *schema["$defs"].items()]:
        for key, option in part.get("properties", {}).items():
            assert option.get("description"), f"{name}.{key}"
    for rule in schema["$defs"]["RuleConfig"]["anyOf"][2:-1]:
        for key, option in rule["properties"].items():
            assert key == "type" or option["description"], f"{rule['title']}.{key}"
