"""What an evaluation found: rows of plain data, as a table, as CSV and as JSON."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

Track = Callable[[int, int], None]
"""Told how far an evaluation is: so many of so many tokens."""


def untracked(done: int, total: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Column:
    """A column of a table: the key of its values in the rows, its title, and how a value is written."""

    key: str
    title: str
    style: str = ""
    """A format specification, such as ".3f" or ","."""


@dataclass(frozen=True)
class Result:
    """One evaluation of one model."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: list[dict[str, Any]]
    remarks: tuple[str, ...] = ()

    def table(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, title_justify="left")
        for column in self.columns:
            words = any(isinstance(row[column.key], str) for row in self.rows)
            table.add_column(column.title, justify="left" if words else "right")
        for row in self.rows:
            table.add_row(*(_shown(row[column.key], column.style) for column in self.columns))
        return table

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        # JSON has no NaN and no infinity.
        rows = [{key: _finite(value) for key, value in row.items()} for row in self.rows]
        return {"name": self.name, "title": self.title, "rows": rows, "remarks": list(self.remarks)}

    def write(self, folder: Path) -> list[Path]:
        """NAME.csv and NAME.json in a folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        table, data = folder / f"{self.name}.csv", folder / f"{self.name}.json"
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [column.key for column in self.columns])
            writer.writeheader()
            writer.writerows(self.rows)
        data.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
        return [table, data]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: Any, style: str) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else format(value, style)
