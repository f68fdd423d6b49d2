"""What pydantic found wrong, in words: key paths as the user wrote them, what came, what is allowed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from linear_moe.models.errors import Problem, ProblemsFoundError, choices
from linear_moe.models.yaml_reader import Path

_KINDS = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing", bool: "a truth value"}


def problems_of(error: ValidationError, model: type[BaseModel], lines: dict[Path, int]) -> list[Problem]:
    """Each thing that is wrong with a `model`, with its line where known, in the order of the file."""
    problems = [_with_line(problem, lines) for problem in _flatten(error, model)]
    return sorted(problems, key=lambda problem: problem.line or 0)


def _flatten(error: ValidationError, model: type[BaseModel]) -> Iterator[Problem]:
    for detail in error.errors(include_url=False):
        path = tuple(key for key, is_tag in _walk(detail["loc"], model) if not is_tag)
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, ProblemsFoundError):
            for problem in cause.problems:
                yield Problem(".".join([*map(str, path), *filter(None, [problem.path])]), problem.message)
        else:
            yield _problem(detail, path, _allowed(detail["loc"], model))


def _problem(detail: ErrorDetails, path: Path, allowed: Sequence[str]) -> Problem:
    kind, context, came = detail["type"], detail.get("ctx", {}), detail["input"]
    dotted = ".".join(str(key) for key in path)
    if kind == "extra_forbidden":
        return Problem(dotted, f"unknown key; {choices(path[-1], allowed)}")
    if kind == "missing":
        return Problem(dotted, "is required")
    if kind == "union_tag_not_found":
        return Problem(f"{dotted}.type", f"is required; allowed: {', '.join(allowed)}")
    if kind == "union_tag_invalid":
        return Problem(f"{dotted}.type", f"unknown type {context['tag']!r}; {choices(context['tag'], allowed)}")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return Problem(dotted, f"must be a mapping, got {_shown(came)}")
    if path and path[-1] == "[key]":
        where = ".".join(str(key) for key in path[:-2])
        message = f"{path[-2]!r} is no name: letters, digits, '_' and '-', a letter or '_' first"
        return Problem(where, message)
    message = detail["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if detail["msg"].startswith("Input should be "):
        message = f"must be {message}"
    return Problem(dotted, f"{message}, got {_shown(came)}")


def _shown(value: Any) -> str:
    kind = _KINDS.get(type(value))
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{kind} {text}" if kind and value is not None else kind or text


def _allowed(location: Path, model: type[BaseModel]) -> list[str]:
    """What could stand where the location's last key is: keys of the mapping, or the types of a union."""
    place: Any = model
    for key in location[:-1]:
        place = _step(place, key)
    last = _step(place, location[-1]) if location else None
    if isinstance(last, dict):
        return list(last)
    if isinstance(place, type) and issubclass(place, BaseModel):
        # `type` first: it decides which others there are.
        return sorted(place.model_fields, key=lambda name: name != "type")
    return []


def _walk(location: Path, model: type[BaseModel]) -> Iterator[tuple[str | int, bool]]:
    """Each key, and whether it is the type that pydantic puts in behind a key whose value is one of several models."""
    place: Any = model
    for key in location:
        yield key, isinstance(place, dict) and key in place
        place = _step(place, key)


def _step(place: Any, key: str | int) -> Any:
    """Below a model: a field's model, the models of a union by type, or the model of a mapping's values."""
    if isinstance(place, dict):
        return place.get(key)
    if isinstance(place, _Values):
        return place.model
    if not (isinstance(place, type) and issubclass(place, BaseModel)) or key not in place.model_fields:
        return None
    field = place.model_fields[str(key)]
    if field.discriminator is not None:
        members = get_args(field.annotation)
        return {get_args(member.model_fields["type"].annotation)[0]: member for member in members}
    arguments = get_args(field.annotation)
    if len(arguments) == 2 and isinstance(arguments[1], type) and issubclass(arguments[1], BaseModel):
        return _Values(arguments[1])
    return field.annotation


class _Values:
    """A mapping from free names to models."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.model = model


def _with_line(problem: Problem, lines: dict[Path, int]) -> Problem:
    """The line of the key or, where it is not in the file, of the nearest mapping around it."""
    path: Path = tuple(problem.path.split(".")) if problem.path else ()
    while path and path not in lines:
        path = path[:-1]
    return Problem(problem.path, problem.message, lines.get(path) if path else None)
