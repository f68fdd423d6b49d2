"""`rule:` in a configuration: a rule's name, or a mapping of its type and options."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    create_model,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from linear_moe.models.errors import Problem, ProblemsFoundError, choices
from linear_moe.models.validation import problems_of
from linear_moe.rules.base import RuleDims, UpdateRule
from linear_moe.rules.registry import get_rule, rule_names

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
"""Unknown keys are errors, "4" is no number, 1 is no truth value."""


class RuleConfig(BaseModel):
    """A rule and its options. Options that the rule does not have, or not of that type, are errors."""

    model_config = STRICT

    type: str
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, RuleConfig):
            return {"type": value.type, "options": value.options}
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, dict):
            message = (
                f"must be the name of a rule, or a mapping such as {{type: gla, gate_rank: 16}}; got {value!r:.60}"
            )
            raise ProblemsFoundError([Problem("", message)])
        name, names = value.get("type"), rule_names()
        if name is None:
            raise ProblemsFoundError([Problem("type", f"is required; allowed: {', '.join(names)}")])
        if name not in names:
            raise ProblemsFoundError([Problem("", f"unknown rule {name!r}; {choices(name, names)}")])
        model = options_model(get_rule(name))
        try:
            options = model.model_validate({key: option for key, option in value.items() if key != "type"})
        except ValidationError as error:
            raise ProblemsFoundError(problems_of(error, model, {})) from None
        return {"type": name, "options": options.model_dump(exclude_unset=True)}

    @model_serializer
    def _write(self) -> Any:
        return {"type": self.type, **self.options} if self.options else self.type

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return _json_schema()

    def build(self, dims: RuleDims) -> UpdateRule:
        """The rule at these sizes.

        Raises:
            ValueError: if the rule can't be built so.
        """
        return get_rule(self.type)(dims, **self.options)


@functools.cache
def options_model(rule: type[UpdateRule]) -> type[BaseModel]:
    """A schema of the options of a rule: the fields of its dataclass beside `dims`."""
    hints = typing.get_type_hints(rule)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(rule):
        if field.name == "dims":
            continue
        default = ... if field.default is dataclasses.MISSING else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        fields[field.name] = (hints[field.name], Field(default=default, description=field.metadata.get("help")))
    return create_model(rule.__name__, __config__=STRICT, **fields)


def _json_schema() -> JsonSchemaValue:
    """The built-in rules in full; of a rule that a user registers an editor knows only that it has a type."""
    built_in = [name for name in rule_names() if get_rule(name).__module__.startswith("linear_moe.")]
    mappings = []
    for name in built_in:
        rule = get_rule(name)
        schema = options_model(rule).model_json_schema()
        mappings.append(
            {
                "title": name,
                "type": "object",
                "description": (rule.__doc__ or "").partition("\n")[0],
                "properties": {"type": {"const": name}, **schema.get("properties", {})},
                "required": ["type", *schema.get("required", [])],
                "additionalProperties": False,
            }
        )
    other = {
        "title": "a registered rule",
        "type": "object",
        "properties": {"type": {"type": "string", "not": {"enum": built_in}}},
        "required": ["type"],
    }
    return {
        "title": "Rule",
        "description": "The rule's name, or a mapping of its type and options.",
        "anyOf": [{"enum": built_in}, {"type": "string"}, *mappings, other],
    }
