"""YAML text to plain Python data: safe, strict about duplicate keys, and with the line of each key."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from linear_moe.models.errors import ConfigError, Problem

Path = tuple[str | int, ...]

_MERGE_TAG = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """A SafeLoader of its own, so that nothing here changes yaml for others."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
    seen: dict[Hashable, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == _MERGE_TAG:
            continue
        key: Any = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if isinstance(key, Hashable):
            if key in seen:
                message = f"duplicate key {key!r} in line {line}, first given in line {seen[key]}"
                raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark)
            seen[key] = line
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
# YAML 1.1 takes 1e-5 (no dot) for text, which YAML 1.2 and people take for a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(text: str, source: str) -> tuple[Any, dict[Path, int]]:
    """The data of a YAML text, and the line (from 1) of each key path in it.

    Raises:
        ConfigError: with the line, for text that is no YAML, a key that is given twice or a tag that is not plain data.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        return loader.construct_document(node), _lines(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ConfigError(source, [Problem("", f"not valid YAML{place}: {error.problem or error.context}")]) from None
    except yaml.YAMLError as error:
        raise ConfigError(source, [Problem("", f"not valid YAML: {error}")]) from None
    except RecursionError:
        raise ConfigError(source, [Problem("", "not valid YAML for a model: nested too deeply")]) from None


def _lines(node: yaml.Node) -> dict[Path, int]:
    lines: dict[Path, int] = {(): node.start_mark.line + 1}
    open_nodes: list[tuple[Path, yaml.Node]] = [((), node)]
    # An alias stands for a node that was met before: its keys are listed where they are written, once.
    met: set[int] = set()
    while open_nodes:
        path, parent = open_nodes.pop()
        if not isinstance(parent, yaml.MappingNode) or id(parent) in met:
            continue
        met.add(id(parent))
        below = [((*path, key.value), key, value) for key, value in parent.value]
        lines.update({deeper: key.start_mark.line + 1 for deeper, key, _ in below})
        # The first on top: an anchor stands before its aliases, and its keys are looked for under its own path.
        open_nodes.extend((deeper, value) for deeper, _, value in reversed(below))
    return lines
