"""The one registry of rules: built in, registered by the user, or brought by an installed plugin."""

from __future__ import annotations

import difflib
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import TypeVar

from linear_moe.rules.base import UpdateRule

ENTRY_POINT_GROUP = "linear_moe.rules"

_registry: dict[str, type[UpdateRule]] = {}
_plugins_loaded = False
_R = TypeVar("_R", bound=type[UpdateRule])


def register_rule(name: str) -> Callable[[_R], _R]:
    """Class decorator: make an `UpdateRule` known by `name` to layers, YAML files, the CLI and the law battery.

    Raises:
        ValueError: if the name is no lower-case identifier, is taken by another class, or the class is no rule.
    """
    if not (isinstance(name, str) and name.isidentifier() and name == name.lower()):
        raise ValueError(f"a rule's name must be a lower-case identifier such as 'gated_deltanet', got {name!r}")

    def register(rule: _R) -> _R:
        if not (isinstance(rule, type) and issubclass(rule, UpdateRule)):
            raise ValueError(f"register_rule({name!r}) decorates a subclass of UpdateRule, got {rule!r}")
        taken = _registry.get(name)
        # The same class defined again (a notebook cell, a reload) replaces itself; another class may not.
        if taken is not None and (taken.__module__, taken.__qualname__) != (rule.__module__, rule.__qualname__):
            raise ValueError(
                f"the rule name {name!r} is taken by {taken.__module__}.{taken.__qualname__}; choose another for "
                f"{rule.__module__}.{rule.__qualname__}"
            )
        rule.name = name
        _registry[name] = rule
        return rule

    return register


def get_rule(name: str) -> type[UpdateRule]:
    """The class of the rule registered as `name`.

    Raises:
        ValueError: if there is none, naming the nearest and all registered names.
    """
    if name not in _registry:
        _load_plugins()
    if name in _registry:
        return _registry[name]
    near = difflib.get_close_matches(str(name), _registry, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown rule {name!r}; {hint}registered: {', '.join(sorted(_registry))}")


def rule_names() -> list[str]:
    """Names of all registered rules, plugins included, sorted."""
    _load_plugins()
    return sorted(_registry)


def _load_plugins() -> None:
    """Import the modules that installed packages name under `linear_moe.rules`, once.

    A plugin that does not load is reported and passed over: it must not take the built-in rules down with it.
    """
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            register_rule(entry_point.name)(entry_point.load())
        except Exception as error:
            warnings.warn(
                f"the rule plugin {entry_point.name!r} ({entry_point.value}) could not be loaded: "
                f"{type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=3,
            )
