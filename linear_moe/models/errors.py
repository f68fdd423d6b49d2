"""What a user is told of a configuration that can't be: the key, what came, what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a configuration."""

    path: str
    """The key, such as `blocks.memory.mixer.top_k`; empty for the file as a whole."""
    message: str
    line: int | None = None
    """In the YAML text, from 1."""

    def __str__(self) -> str:
        where = f"{self.path} (line {self.line})" if self.line is not None and self.path else self.path
        return f"{where}: {self.message}" if where else self.message


class ConfigError(ValueError):
    """A configuration that can't be read or built.

    Attributes:
        source: where it came from.
        problems: all that was found.
    """

    def __init__(self, source: str, problems: Iterable[Problem]) -> None:
        self.source = source
        self.problems = list(problems)
        lines = [str(problem) for problem in self.problems]
        if len(lines) == 1:
            text = f"{source}: {lines[0]}"
        else:
            text = f"{source}: {len(lines)} problems\n" + "\n".join("  " + line.replace("\n", "\n  ") for line in lines)
        super().__init__(text)


class ProblemsFoundError(ValueError):
    """Raised inside validation by what looks deeper than types; the paths are below the mapping being validated."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("; ".join(str(problem) for problem in problems))


def choices(came: object, allowed: Iterable[str]) -> str:
    """What to say of a name that is none of `allowed`: the nearest, and all."""
    allowed = list(allowed)
    near = difflib.get_close_matches(str(came), allowed, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}allowed: {', '.join(allowed) or 'none'}"
